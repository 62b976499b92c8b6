// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
// This file computes the activation between an expert's two matrices and its derivative, as activations.py does.

#pragma once

#include <math.h>

#include "vectors.h"

// The kinds SILU, GELU_TANH, RELU, RELU_SQUARED, CLAMPED_SWIGLU and CLAMPED_SILU are defined by structures.py.

// exponential returns e^x with an error of at most 2 units in the last place.
INLINE float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r * r + r + 1;
    union { int32_t bits; float value; } power = {.bits = ((int32_t)n + 127) << 23};
    return y * power.value;
}

INLINE float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// Activated is a point of an activation a = value * factor, where value = f(g) and factor depends on u.
// slope is df/dg, factor_slope is dfactor/du.
typedef struct { float value, slope, factor, factor_slope; } Activated;

// activate evaluates one activation at one pair (g, u) of h; `u` is unused if not gated.
INLINE Activated activate(int kind, int gated, float g, float u, float alpha, float limit) {
    Activated acted = {.factor = gated ? u : 1, .factor_slope = 1};
    if (kind == SILU) {
        float s = sigmoid(g);
        acted.value = g * s;
        acted.slope = s * (1 + g * (1 - s));
    } else if (kind == GELU_TANH) {  // 1 + tanh(z) = 2 sigmoid(2 z)
        float s = sigmoid(1.5957691216f * (g + 0.044715f * g * g * g));
        acted.value = g * s;
        acted.slope = s + g * s * (1 - s) * 1.5957691216f * (1 + 0.134145f * g * g);
    } else if (kind == RELU) {
        acted.value = g < 0 ? 0 : g;
        acted.slope = g <= 0 ? 0 : 1;
    } else if (kind == RELU_SQUARED) {
        float positive = g < 0 ? 0 : g;
        acted.value = positive * positive;
        acted.slope = 2 * positive;
    } else {  // CLAMPED_SWIGLU or CLAMPED_SILU, with g and u clamped; only the former adds 1 to u
        float clamped = g > limit ? limit : g, s = sigmoid(alpha * clamped);
        acted.value = clamped * s;
        acted.slope = g <= limit ? s * (1 + alpha * clamped * (1 - s)) : 0;
        acted.factor = (u > limit ? limit : u < -limit ? -limit : u) + (kind == CLAMPED_SWIGLU);
        acted.factor_slope = fabsf(u) <= limit ? 1 : 0;
    }
    return acted;
}

// Activation describes an activation.
typedef struct {
    long kind;
    long gated;           // 1 if h has two parts g and u
    long paired;          // 1 if h is g0, u0, g1, u1, ..., 0 if it is all g, then all u
    double alpha, limit;  // of CLAMPED_SWIGLU and CLAMPED_SILU
} Activation;

// FOR_KIND calls `run(kind, gated, step, distance)` with constants, so that the compiler removes the branches in `run`.
// Of h, g[i] is h[i * step] and u[i] is h[i * step + distance].
#define FOR_KIND(activation, run) \
    switch ((activation).kind) { \
        case SILU: FOR_LAYOUT(activation, run, SILU); break; \
        case GELU_TANH: FOR_LAYOUT(activation, run, GELU_TANH); break; \
        case RELU: FOR_LAYOUT(activation, run, RELU); break; \
        case RELU_SQUARED: FOR_LAYOUT(activation, run, RELU_SQUARED); break; \
        case CLAMPED_SWIGLU: FOR_LAYOUT(activation, run, CLAMPED_SWIGLU); break; \
        default: FOR_LAYOUT(activation, run, CLAMPED_SILU); \
    }
#define FOR_LAYOUT(activation, run, kind) \
    if (!(activation).gated) { run(kind, 0, 1, 0); } \
    else if ((activation).paired) { run(kind, 1, 2, 1); } \
    else { run(kind, 1, 1, width); }

#define FORWARD_LOOP(kind, gated, step, distance) \
    _Pragma("omp simd") for (long i = 0; i < width; i++) { \
        Activated acted = activate( \
            kind, gated, to_float(h[i * (step)]), to_float(h[i * (step) + (distance)]), alpha, limit \
        ); \
        a[i] = from_float(acted.value * acted.factor * factor); \
    }

// activation_forward computes one row: a (I,) = activation(h) * factor, from h (C,).
//   width   I
//   factor  the combine weight of the row
static void activation_forward(Activation activation, const Element *h, long width, float factor, Element *a) {
    float alpha = activation.alpha, limit = activation.limit;
    FOR_KIND(activation, FORWARD_LOOP)
}

#define BACKWARD_LOOP(kind, gated, step, distance) \
    _Pragma("omp simd reduction(+ : slope)") for (long i = 0; i < width; i++) { \
        Activated acted = activate( \
            kind, gated, to_float(h[i * (step)]), to_float(h[i * (step) + (distance)]), alpha, limit \
        ); \
        float output = acted.value * acted.factor, grad = grad_a[i] * factor; \
        slope += grad_a[i] * output; \
        a[i] = from_float(output * factor); \
        grad_h[i * (step)] = from_float(grad * acted.factor * acted.slope); \
        if (gated) grad_h[i * (step) + (distance)] = from_float(grad * acted.value * acted.factor_slope); \
    }

// activation_backward computes one row: a (I,) = activation(h) * factor and the gradient grad_h (C,).
//   grad_a  (I,) the gradient of activation(h) without the factor, which is dO W2
// Returns the gradient of the factor.
static float activation_backward(
    Activation activation, const Element *h, const float *grad_a, long width, float factor, Element *a, Element *grad_h
) {
    float alpha = activation.alpha, limit = activation.limit, slope = 0;
    FOR_KIND(activation, BACKWARD_LOOP)
    return slope;
}
