// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
// What stands between an expert's two matrices, with its derivative: gates.py in C.

#pragma once

#include <math.h>

#include "numbers.h"

enum { SILU, GELU_TANH, RELU, RELU_SQUARED, CLAMPED };

// e^x to 2 units in the last place
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

// a = value * factor, of h's two halves gate and up, and the slopes of both parts
typedef struct { float value, slope, factor, up_slope; } Acted;

INLINE Acted act(int kind, int gated, float gate, float up, float alpha, float limit) {
    Acted acted = {.factor = gated ? up : 1, .up_slope = 1};
    if (kind == SILU) {
        float s = sigmoid(gate);
        acted.value = gate * s;
        acted.slope = s * (1 + gate * (1 - s));
    } else if (kind == GELU_TANH) {  // 1 + tanh(z) = 2 sigmoid(2 z)
        float s = sigmoid(1.5957691216f * (gate + 0.044715f * gate * gate * gate));
        acted.value = gate * s;
        acted.slope = s + gate * s * (1 - s) * 1.5957691216f * (1 + 0.134145f * gate * gate);
    } else if (kind == RELU) {
        acted.value = gate < 0 ? 0 : gate;
        acted.slope = gate <= 0 ? 0 : 1;
    } else if (kind == RELU_SQUARED) {
        float positive = gate < 0 ? 0 : gate;
        acted.value = positive * positive;
        acted.slope = 2 * positive;
    } else {  // gpt-oss's, as gates.py has it
        float clamped = gate > limit ? limit : gate, s = sigmoid(alpha * clamped);
        acted.value = clamped * s;
        acted.slope = gate <= limit ? s * (1 + alpha * clamped * (1 - s)) : 0;
        acted.factor = (up > limit ? limit : up < -limit ? -limit : up) + 1;
        acted.up_slope = fabsf(up) <= limit ? 1 : 0;
    }
    return acted;
}

typedef struct {
    long kind, gated, paired;  // paired: h is g0, u0, g1, u1, ... rather than all g, then all u
    double alpha, limit;
} Gate;

// calls `run` with constants for what the loops inside should not ask again
#define FOR_KIND(gate, run) \
    switch ((gate).kind) { \
        case SILU: FOR_LAYOUT(gate, run, SILU); break; \
        case GELU_TANH: FOR_LAYOUT(gate, run, GELU_TANH); break; \
        case RELU: FOR_LAYOUT(gate, run, RELU); break; \
        case RELU_SQUARED: FOR_LAYOUT(gate, run, RELU_SQUARED); break; \
        default: FOR_LAYOUT(gate, run, CLAMPED); \
    }
#define FOR_LAYOUT(gate, run, kind) \
    if (!(gate).gated) { run(kind, 0, 1, 0); } \
    else if ((gate).paired) { run(kind, 1, 2, 1); } \
    else { run(kind, 1, 1, width); }

// a = gate(h) * factor, of one row
#define ACT_FORWARD(kind, gated, step, distance) \
    _Pragma("omp simd") for (long i = 0; i < width; i++) { \
        Acted acted = act(kind, gated, widen(h[i * (step)]), widen(h[i * (step) + (distance)]), alpha, limit); \
        a[i] = narrow(acted.value * acted.factor * factor); \
    }

static void gate_forward(Gate gate, const Element *h, long width, float factor, Element *a) {
    float alpha = gate.alpha, limit = gate.limit;
    FOR_KIND(gate, ACT_FORWARD)
}

// of one row, given back = dO W2: a = gate(h) * factor and grad_h; returns the gradient of factor
#define ACT_BACKWARD(kind, gated, step, distance) \
    _Pragma("omp simd reduction(+ : slope)") for (long i = 0; i < width; i++) { \
        Acted acted = act(kind, gated, widen(h[i * (step)]), widen(h[i * (step) + (distance)]), alpha, limit); \
        float output = acted.value * acted.factor, grad = back[i] * factor; \
        slope += back[i] * output; \
        a[i] = narrow(output * factor); \
        grad_h[i * (step)] = narrow(grad * acted.factor * acted.slope); \
        if (gated) grad_h[i * (step) + (distance)] = narrow(grad * acted.value * acted.up_slope); \
    }

static float gate_backward(
    Gate gate, const Element *h, const float *back, long width, float factor, Element *a, Element *grad_h
) {
    float alpha = gate.alpha, limit = gate.limit, slope = 0;
    FOR_KIND(gate, ACT_BACKWARD)
    return slope;
}
