// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
// This file defines the elements of one dtype (ELEMENT) and vectors of them. It uses GCC's vector extensions, which
// compile for any processor.

#pragma once

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

// to_float and from_float convert one element.
#if ELEMENT == FLOAT32
typedef float Element;
INLINE float to_float(Element x) { return x; }
INLINE Element from_float(float x) { return x; }
#elif ELEMENT == BFLOAT16
typedef uint16_t Element;
typedef union { uint32_t bits; float value; } Bits;
INLINE float to_float(Element x) { return ((Bits){.bits = (uint32_t)x << 16}).value; }
INLINE Element from_float(float x) {
    uint32_t bits = ((Bits){.value = x}).bits;
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // rounds to nearest, ties to even
}
#else
typedef _Float16 Element;
INLINE float to_float(Element x) { return x; }
INLINE Element from_float(float x) { return x; }
#endif

// A Word is what the processor multiplies: one float, or two bf16 numbers that are neighbours in the summed dimension.
#if ELEMENT == BFLOAT16 && defined(__AVX512BF16__)
#include <immintrin.h>
#define PER_WORD 2
typedef uint32_t Word;
#else
#define PER_WORD 1
typedef float Word;
#endif

// A vector has LANES floats. A tile of a product is ROWS x PANEL (matmul.h) and fills the vector registers.
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 4
#else
#define LANES 4
#define ROWS 4
#endif

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef Word Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef Element Elements __attribute__((vector_size(sizeof(Element) * LANES), aligned(sizeof(Element)), may_alias));

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
// up_to rounds a size up to a multiple.
INLINE long up_to(long size, long multiple) { return (size + multiple - 1) / multiple * multiple; }
// words counts the words that hold a number of elements.
INLINE long words(long elements) { return up_to(elements, PER_WORD) / PER_WORD; }

// load converts LANES elements to floats.
INLINE Floats load(const Element *source) {
#if ELEMENT == BFLOAT16
    typedef uint32_t Wide __attribute__((vector_size(4 * LANES)));
    return (Floats)(__builtin_convertvector(*(const Elements *)source, Wide) << 16);
#else
    return __builtin_convertvector(*(const Elements *)source, Floats);
#endif
}

// store converts LANES floats to elements.
INLINE void store(Element *to, Floats x) {
#if PER_WORD == 2
    *(Elements *)to = (Elements)_mm512_cvtneps_pbh((__m512)x);
#elif ELEMENT == BFLOAT16
    float numbers[LANES];
    *(Floats *)numbers = x;
    for (int i = 0; i < LANES; i++) to[i] = from_float(numbers[i]);
#else
    *(Elements *)to = __builtin_convertvector(x, Elements);
#endif
}

// load_words reads LANES words: LANES * PER_WORD elements.
INLINE Words load_words(const Element *source) {
#if PER_WORD == 2
    return *(const Words *)source;
#else
    return load(source);
#endif
}

// multiply_add returns sum + left * right, with the products of the elements in a word added up.
INLINE Floats multiply_add(Words left, Words right, Floats sum) {
#if PER_WORD == 2
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#else
    return sum + left * right;
#endif
}

// repeat copies one word into all lanes.
INLINE Words repeat(Word word) { return word - (Words){0}; }
