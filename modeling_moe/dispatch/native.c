// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
//
// The experts on a CPU. Compiled for one dtype (ELEMENT) by compiling.py, called by native.py.
//
// T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts.
// A row is a served slot, in the order of the experts; a chunk is up to BLOCK rows of one expert.
//
// A product reads its left side word by word and its right side in panels, packed so that a word of each line lies next
// to that of the other lines (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008). Threads
// take chunks, and for the gradients of matrices BLOCKs of their lines: nothing is added up by two threads, so the
// result does not depend on how many there are.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// ---- numbers ----------------------------------------------------------------------------------------------------

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

#if ELEMENT == FLOAT32
typedef float Element;
INLINE float widen(Element x) { return x; }
INLINE Element narrow(float x) { return x; }
#elif ELEMENT == BFLOAT16
typedef uint16_t Element;
typedef union { uint32_t bits; float value; } Bits;
INLINE float widen(Element x) { return ((Bits){.bits = (uint32_t)x << 16}).value; }
INLINE Element narrow(float x) {
    uint32_t bits = ((Bits){.value = x}).bits;
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}
#else
typedef _Float16 Element;
INLINE float widen(Element x) { return x; }
INLINE Element narrow(float x) { return x; }
#endif

// what the processor multiplies: a float, or two bf16 numbers that are neighbours in the dimension summed over
#if ELEMENT == BFLOAT16 && defined(__AVX512BF16__)
#include <immintrin.h>
#define PER_WORD 2
typedef uint32_t Word;
#else
#define PER_WORD 1
typedef float Word;
#endif

// a tile of a product is ROWS x (VECTORS * LANES) and fills the registers
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
#define VECTORS 3
#define PANEL (VECTORS * LANES)
#define BLOCK 256
#define DEPTH 512  // words of a line that are packed at once: with BLOCK lines they fit a second-level cache
#define UNPACKED (16 / PER_WORD)  // rows that are too few to pack a matrix for
#define FEW 256  // the most slots that decode takes
#define VECTOR (PER_WORD * LANES)  // numbers in a vector of words

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef Word Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef Element Elements __attribute__((vector_size(sizeof(Element) * LANES), aligned(sizeof(Element)), may_alias));

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long up_to(long size, long multiple) { return (size + multiple - 1) / multiple * multiple; }
INLINE long words(long elements) { return up_to(elements, PER_WORD) / PER_WORD; }

INLINE Floats load(const Element *from) {
#if ELEMENT == BFLOAT16
    typedef uint32_t Wide __attribute__((vector_size(4 * LANES)));
    return (Floats)(__builtin_convertvector(*(const Elements *)from, Wide) << 16);
#else
    return __builtin_convertvector(*(const Elements *)from, Floats);
#endif
}

INLINE void store(Element *to, Floats x) {
#if PER_WORD == 2
    *(Elements *)to = (Elements)_mm512_cvtneps_pbh((__m512)x);
#elif ELEMENT == BFLOAT16
    float numbers[LANES];
    *(Floats *)numbers = x;
    for (int i = 0; i < LANES; i++) to[i] = narrow(numbers[i]);
#else
    *(Elements *)to = __builtin_convertvector(x, Elements);
#endif
}

INLINE Words load_words(const Element *from) {
#if PER_WORD == 2
    return *(const Words *)from;
#else
    return load(from);
#endif
}

INLINE Floats multiply_add(Words left, Words right, Floats sum) {
#if PER_WORD == 2
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#else
    return sum + left * right;
#endif
}

INLINE Words repeat(Word word) { return word - (Words){0}; }

// ---- products ---------------------------------------------------------------------------------------------------

// One side of a product: lines of contiguous numbers, `stride` apart, picked by `index` if there is one. Either a line
// runs through the dimension that is summed over, or, if `across`, each line is one number of it.
typedef struct {
    const Element *data;
    const int32_t *index;
    long stride;
    int across;
} Side;

INLINE const Element *line_of(Side side, long line) {
    return side.data + (side.index ? side.index[line] : line) * side.stride;
}

// Where a product goes: `wide` or `element`, plus factor (a row's) times bias (a column's) if there is a bias.
typedef struct {
    float *wide;
    Element *element;
    long stride;
    const Element *bias;
    const float *factor;
} Target;

// to[p * width + i]: word p of line first + i of a side that runs across, 0 beyond `count` lines
static void pack_across(Side side, long first, long count, long width, long depth, Word *to) {
    for (long p = 0; p < words(depth); p++, to += width) {
        const Element *line = line_of(side, p * PER_WORD) + first;
#if PER_WORD == 2
        if (p * 2 + 1 < depth) {
            const Element *next = line_of(side, p * 2 + 1) + first;
            for (long i = 0; i < count; i++) to[i] = line[i] | (Word)next[i] << 16;
        } else {
            for (long i = 0; i < count; i++) to[i] = line[i];
        }
#else
        for (long i = 0; i < count; i++) to[i] = widen(line[i]);
#endif
        for (long i = count; i < width; i++) to[i] = 0;
    }
}

// to[i * stride + p]: word p of line first + i
static void pack_along(Side side, long first, long count, long depth, long stride, Word *to) {
    for (long i = 0; i < count; i++, to += stride) {
        const Element *line = line_of(side, first + i);
#if PER_WORD == 2
        to[words(depth) - 1] = 0;
        memcpy(to, line, depth * sizeof(Element));
#else
        for (long p = 0; p < depth; p++) to[p] = widen(line[p]);
#endif
    }
}

// LANES words of each of LANES lines, exchanged: in step s the blocks of s x s beside the diagonal change places
INLINE void transpose(Words *block) {
    UNROLL
    for (int step = 1; step < LANES; step *= 2) {
        Mask low, high;
        UNROLL
        for (int i = 0; i < LANES; i++) {
            low[i] = i & step ? LANES + i - step : i;
            high[i] = i & step ? LANES + i : i + step;
        }
        UNROLL
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            Words first = block[i], second = block[i + step];
            block[i] = __builtin_shuffle(first, second, low);
            block[i + step] = __builtin_shuffle(first, second, high);
        }
    }
}

// the same as `pack_across` does, of a side whose lines run along
static void pack_transposed(Side side, long first, long count, long width, long depth, Word *to) {
    long full = depth / (PER_WORD * LANES);  // steps that read no further than the end of a line
    for (long j = 0; j < width; j += LANES) {
        for (long i = 0; i < LANES && j + i < count; i++) {
            const char *line = (const char *)line_of(side, first + j + i);
            for (long p = 0; p < depth * (long)sizeof(Element); p += 64) __builtin_prefetch(line + p, 0, 2);
        }
        for (long p = 0; p < words(depth); p += LANES) {
            Words block[LANES];
            if (j + LANES <= count && p < full * LANES) {
                UNROLL
                for (int i = 0; i < LANES; i++) block[i] = load_words(line_of(side, first + j + i) + p * PER_WORD);
            } else {
                for (int i = 0; i < LANES; i++) {
                    Element rest[PER_WORD * LANES] = {0};
                    long left = min(depth - p * PER_WORD, PER_WORD * LANES);
                    if (j + i < count)
                        memcpy(rest, line_of(side, first + j + i) + p * PER_WORD, left * sizeof(Element));
                    block[i] = load_words(rest);
                }
            }
            transpose(block);
            long lines = min(LANES, words(depth) - p);
            if (lines == LANES) {
                UNROLL
                for (int i = 0; i < LANES; i++) *(Words *)(to + (p + i) * width + j) = block[i];
            } else {
                for (long i = 0; i < lines; i++) *(Words *)(to + (p + i) * width + j) = block[i];
            }
        }
    }
}

// Adds ROWS lines of the left side times a panel to tile (ROWS, vectors * LANES), or to 0 if it is the first part of a
// sum. Word p of line i is left[i * line + p * step].
INLINE void multiply(
    int vectors, const Word *left, long line, long step, const Word *panel, long depth, int first, float *tile
) {
    Floats sums[ROWS][VECTORS];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        UNROLL
        for (int j = 0; j < vectors; j++)
            sums[i][j] = first ? (Floats){0} : *(Floats *)(tile + (i * vectors + j) * LANES);
    for (long p = 0; p < depth; p++) {
        Words right[VECTORS];
        UNROLL
        for (int j = 0; j < vectors; j++) right[j] = *(const Words *)(panel + (p * vectors + j) * LANES);
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            Words word = repeat(left[i * line + p * step]);
            UNROLL
            for (int j = 0; j < vectors; j++) sums[i][j] = multiply_add(word, right[j], sums[i][j]);
        }
    }
    UNROLL
    for (int i = 0; i < ROWS; i++)
        UNROLL
        for (int j = 0; j < vectors; j++) *(Floats *)(tile + (i * vectors + j) * LANES) = sums[i][j];
}

static void multiply_block(
    int across, int vectors, const Word *left, long stride, const Word *panel, long depth, int first, float *tile
) {
    if (across) {
        if (vectors == 3) multiply(3, left, 1, stride, panel, depth, first, tile);
        else if (vectors == 2) multiply(2, left, 1, stride, panel, depth, first, tile);
        else multiply(1, left, 1, stride, panel, depth, first, tile);
    } else {
        if (vectors == 3) multiply(3, left, stride, 1, panel, depth, first, tile);
        else if (vectors == 2) multiply(2, left, stride, 1, panel, depth, first, tile);
        else multiply(1, left, stride, 1, panel, depth, first, tile);
    }
}

// writes a line of a tile, of which `columns` numbers count, to (row, column) of the target
INLINE void put_line(Target target, long row, long column, long columns, const float *line) {
    long start = row * target.stride + column, j = 0;
    const Element *bias = target.bias ? target.bias + column : 0;
    float factor = bias && target.factor ? target.factor[row] : 1;
    for (; j + LANES <= columns; j += LANES) {
        Floats sums = *(const Floats *)(line + j);
        if (bias) sums += factor * load(bias + j);
        if (target.wide) *(Floats *)(target.wide + start + j) = sums;
        else store(target.element + start + j, sums);
    }
    for (; j < columns; j++) {
        float sum = bias ? line[j] + factor * widen(bias[j]) : line[j];
        if (target.wide) target.wide[start + j] = sum;
        else target.element[start + j] = narrow(sum);
    }
}

static void put(Target target, long row, long column, long rows, long columns, const float *tile, long width) {
    for (long i = 0; i < rows; i++) put_line(target, row + i, column, columns, tile + i * width);
}

// adds VECTOR numbers of a line times those of n states
INLINE void add_products(int n, const Element *line, const Element *const *states, long start, Floats *sums) {
    Words left = load_words(line + start);
    UNROLL
    for (int j = 0; j < n; j++) sums[j] = multiply_add(left, load_words(states[j] + start), sums[j]);
}

// sums[i * n + j]: line i times state j, LANES sums in all. One line after the other, as memory likes to be read
INLINE Floats dots(int n, const Element *const *lines, const Element *const *states, long depth) {
    Floats sums[LANES];
    long done = depth / VECTOR * VECTOR;
    for (int i = 0; i < LANES / n; i++) {
        Floats own[4] = {0};
        for (long start = 0; start < done; start += VECTOR) {
            add_products(n, lines[i], states, start, own);
        }
        if (done < depth) {
            Element rest[5][VECTOR] = {0};
            const Element *state[4];
            memcpy(rest[4], lines[i] + done, (depth - done) * sizeof(Element));
            for (int j = 0; j < n; j++) state[j] = memcpy(rest[j], states[j] + done, (depth - done) * sizeof(Element));
            add_products(n, rest[4], state, 0, own);
        }
        UNROLL
        for (int j = 0; j < n; j++) sums[i * n + j] = own[j];
    }
    transpose((Words *)sums);
    UNROLL
    for (int i = 1; i < LANES; i++) sums[0] += sums[i];
    return sums[0];
}

// tile (n, LANES): n states times LANES lines
INLINE void some(int n, const Element *const *lines, const Element *const *states, long depth, float *tile) {
    for (int i = 0; i < LANES; i += LANES / n) {
        Floats sums = dots(n, lines + i, states, depth);
        UNROLL
        for (int c = 0; c < LANES; c++) tile[c % n * LANES + i + c / n] = sums[c];
    }
}

// rows [row, row + rows) of target: states times lines [first, first + count) of a matrix, count <= LANES
static void few(Side states, long row, long rows, Side lines, long first, long count, long depth, Target target) {
    const Element *line[LANES], *state[4];
    for (long i = 0; i < LANES; i++) line[i] = line_of(lines, first + min(i, count - 1));
    for (long done = 0; done < rows;) {
        long left = rows - done, n = left >= 3 ? 4 : left;
        float tile[4 * LANES];
        for (long j = 0; j < n; j++) state[j] = line_of(states, row + min(done + j, rows - 1));
        if (n == 4) some(4, line, state, depth, tile);
        else if (n == 2) some(2, line, state, depth, tile);
        else some(1, line, state, depth, tile);
        put(target, row + done, first, min(n, left), count, tile, LANES);
        done += n;
    }
}

// from number `start` of the dimension summed over
static Side from(Side side, long start) {
    if (!side.across) side.data += start;
    else if (side.index) side.index += start;
    else side.data += start * side.stride;
    return side;
}

// words between packed lines: a cache line more than there are, else lines would share their places in the cache
#define STRIDE (DEPTH + LANES)

// words of scratch for a product with up to n columns: both sides packed, and sums of which more parts are to come
INLINE long product_scratch(long n) { return (BLOCK + PANEL) * STRIDE + BLOCK * up_to(n, PANEL); }

// target (m, n) = left (m, depth) right (depth, n)
static void product(Side left, Side right, long m, long n, long depth, Word *scratch, Target target) {
    if (m <= UNPACKED && !left.across && !right.across) {
        for (long column = 0; column < n; column += LANES)
            few(left, 0, m, right, column, min(LANES, n - column), depth, target);
        return;
    }
    Word *panel = scratch + BLOCK * STRIDE;
    float *partial = (float *)(panel + PANEL * STRIDE), whole[ROWS * PANEL];
    long step = DEPTH * PER_WORD, stride = left.across ? BLOCK : STRIDE;
    for (long block = 0; block < m; block += BLOCK)
        for (long start = 0; start == 0 || start < depth; start += step) {
            long rows = min(BLOCK, m - block), part = min(step, depth - start);
            if (left.across) pack_across(from(left, start), block, rows, BLOCK, part, scratch);
            else pack_along(from(left, start), block, rows, part, STRIDE, scratch);
            for (long column = 0; column < n; column += PANEL) {
                long columns = min(PANEL, n - column), width = up_to(columns, LANES);
                if (right.across) pack_across(from(right, start), column, columns, width, part, panel);
                else pack_transposed(from(right, start), column, columns, width, part, panel);
                for (long i = 0; i < rows; i += ROWS) {
                    // the last tile reads lines that nobody packed, and only their own sums see them
                    const Word *lines = scratch + (left.across ? i : i * STRIDE);
                    float *tile = depth > step ? partial + (column * BLOCK + i * PANEL) : whole;
                    multiply_block(left.across, width / LANES, lines, stride, panel, words(part), start == 0, tile);
                    if (start + step >= depth)
                        put(target, block + i, column, min(ROWS, rows - i), columns, tile, width);
                }
            }
        }
}

// ---- the gate ---------------------------------------------------------------------------------------------------

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
    if (!(gate).gated) { run(kind, 0, 1, 0); } else if ((gate).paired) { run(kind, 1, 2, 1); } else { run(kind, 1, 1, width); }

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

// ---- the experts ------------------------------------------------------------------------------------------------

// one kind of expert matrix (E, N, M): `stride` lies between lines, which are rows, or columns if `transposed`
typedef struct {
    Element *data;
    long expert, stride, transposed;
} Matrices;

// as native.py has it
typedef struct {
    const Element *x, *up_bias, *down_bias;
    const float *factor;                              // of each row
    const int32_t *offsets, *token, *place;           // E + 1; of each row; of each slot
    long tokens, top_k, hidden, columns, width, experts, threads;
    Matrices up, down;
    Gate gate;
} Problem;

// as the right side of states (., M) times its transpose, or of a gradient (., N) times it
static Side matrix(Matrices matrices, long expert, int back) {
    return (Side){matrices.data + expert * matrices.expert, 0, matrices.stride, matrices.transposed != back};
}

static Side rows_at(const Element *data, const int32_t *index, long stride, int across) {
    return (Side){data, index, stride, across};
}

INLINE const Element *bias_of(const Element *bias, long expert, long size) { return bias ? bias + expert * size : 0; }

// rows of a chunk: BLOCK, or fewer where that leaves threads without work
static long chunk_rows(const Problem *p) {
    long share = p->offsets[p->experts] / (2 * p->threads);
    return max(ROWS, min(BLOCK, up_to(share, ROWS)));
}

// words of one thread's scratch: of products, then h, a and dO W2 of a chunk
long scratch_words(const Problem *p) {
    return product_scratch(max(p->hidden, p->columns)) + BLOCK * (p->columns + 2 * p->width);
}

INLINE Word *behind_product(const Problem *p, Word *scratch) {
    return scratch + product_scratch(max(p->hidden, p->columns));
}

static void forward_chunk(const Problem *p, long expert, long row, long rows, Word *scratch, Element *h, float *output) {
    long hidden = p->hidden, columns = p->columns, width = p->width;
    Element *own = (Element *)behind_product(p, scratch);
    Element *a = own + BLOCK * columns, *before = h ? h + row * columns : own;
    Target to_h = {.element = before, .stride = columns, .bias = bias_of(p->up_bias, expert, columns)};
    product(rows_at(p->x, p->token + row, hidden, 0), matrix(p->up, expert, 0), rows, columns, hidden, scratch, to_h);
    for (long i = 0; i < rows; i++)
        gate_forward(p->gate, before + i * columns, width, p->factor[row + i], a + i * width);
    Target to_output = {
        output + row * hidden, 0, hidden, bias_of(p->down_bias, expert, hidden), p->factor + row
    };
    product(rows_at(a, 0, width, 0), matrix(p->down, expert, 0), rows, hidden, width, scratch, to_output);
}

// output (T, H): each token's rows of (S, H), added up in the order of its slots
static void combine(const Problem *p, long served, const float *rows, Element *output) {
#pragma omp parallel for num_threads(p->threads) if (p->tokens > FEW)
    for (long token = 0; token < p->tokens; token++)
        for (long start = 0; start < p->hidden; start += BLOCK) {
            long size = min(BLOCK, p->hidden - start);
            float sums[BLOCK] = {0};
            for (long k = 0; k < p->top_k; k++) {
                long row = p->place[token * p->top_k + k];
                if (row >= served) continue;
                const float *from = rows + row * p->hidden + start;
                for (long i = 0; i < size; i++) sums[i] += from[i];
            }
            for (long i = 0; i < size; i++) output[token * p->hidden + start + i] = narrow(sums[i]);
        }
}

// h (S, C) or null; rows (S, H) is scratch
void forward(const Problem *p, Word *scratch, long scratch_size, Element *h, float *rows, Element *output) {
    long step = chunk_rows(p);
#pragma omp parallel num_threads(p->threads)
#pragma omp single
    for (long expert = 0; expert < p->experts; expert++)
        for (long row = p->offsets[expert]; row < p->offsets[expert + 1]; row += step) {
            long count = min(step, p->offsets[expert + 1] - row);
#pragma omp task firstprivate(expert, row, count)
            forward_chunk(p, expert, row, count, scratch + omp_get_thread_num() * scratch_size, h, rows);
        }
    combine(p, p->offsets[p->experts], rows, output);
}

// what backward writes; null where it is not wanted, but for grad_h and a, which are scratch as rows is
typedef struct {
    const Element *grad, *h;               // of the output (T, H); h (S, C), or null to compute it again
    Element *grad_h, *a;                   // (S, C), (S, I)
    float *rows, *slope;                   // (S, H); (S,), of each row's factor
    Element *grad_x;                       // (T, H)
    Matrices grad_up, grad_down;
    Element *grad_up_bias, *grad_down_bias;  // (E, C), (E, H)
} Gradients;

static float dot(const Element *left, const Element *right, long size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; i++) sum += widen(left[i]) * widen(right[i]);
    return sum;
}

// to: the sum of an expert's lines, each times its factor if there is one
static void bias_gradient(Side lines, const float *factor, long rows, long size, Element *to) {
    for (long start = 0; start < size; start += BLOCK) {
        long count = min(BLOCK, size - start);
        float sums[BLOCK] = {0};
        for (long row = 0; row < rows; row++) {
            const Element *line = line_of(lines, row) + start;
            float scale = factor ? factor[row] : 1;
            for (long i = 0; i < count; i++) sums[i] += scale * widen(line[i]);
        }
        for (long i = 0; i < count; i++) to[start + i] = narrow(sums[i]);
    }
}

static void backward_chunk(const Problem *p, const Gradients *g, long expert, long row, long rows, Word *scratch) {
    long hidden = p->hidden, columns = p->columns, width = p->width;
    float *back = (float *)behind_product(p, scratch);
    Element *own = (Element *)(back + BLOCK * width);
    const Element *h = g->h ? g->h + row * columns : own;
    const int32_t *token = p->token + row;
    product(
        rows_at(g->grad, token, hidden, 0), matrix(p->down, expert, 1), rows, width, hidden, scratch,
        (Target){.wide = back, .stride = width}
    );
    if (!g->h) {
        Target to_h = {.element = own, .stride = columns, .bias = bias_of(p->up_bias, expert, columns)};
        product(rows_at(p->x, token, hidden, 0), matrix(p->up, expert, 0), rows, columns, hidden, scratch, to_h);
    }
    for (long i = 0; i < rows; i++) {
        float slope = gate_backward(
            p->gate, h + i * columns, back + i * width, width, p->factor[row + i], g->a + (row + i) * width,
            g->grad_h + (row + i) * columns
        );
        if (!g->slope) continue;
        if (p->down_bias) slope += dot(g->grad + token[i] * hidden, p->down_bias + expert * hidden, hidden);
        g->slope[row + i] = slope;
    }
    if (g->rows)
        product(
            rows_at(g->grad_h + row * columns, 0, columns, 0), matrix(p->up, expert, 1), rows, hidden, columns, scratch,
            (Target){.wide = g->rows + row * hidden, .stride = hidden}
        );
}

// lines [first, first + BLOCK) of an expert's gradient, leftᵀ right over its rows, or of its transpose
static void matrix_gradient(Matrices to, long expert, long first, Side left, long n, Side right, long m, long rows, Word *scratch) {
    if (to.transposed) {
        Side side = left;
        long size = n;
        left = right, right = side;
        n = m, m = size;
    }
    left.data += first;
    Target target = {.element = to.data + expert * to.expert + first * to.stride, .stride = to.stride};
    product(left, right, min(BLOCK, n - first), m, rows, scratch, target);
}

void backward(const Problem *p, Word *scratch, long scratch_size, const Gradients *g) {
    long step = chunk_rows(p), hidden = p->hidden, columns = p->columns, width = p->width;
#pragma omp parallel num_threads(p->threads)
#pragma omp single
    for (long expert = 0; expert < p->experts; expert++)
        for (long row = p->offsets[expert]; row < p->offsets[expert + 1]; row += step) {
            long count = min(step, p->offsets[expert + 1] - row);
#pragma omp task firstprivate(expert, row, count)
            backward_chunk(p, g, expert, row, count, scratch + omp_get_thread_num() * scratch_size);
        }
#pragma omp parallel num_threads(p->threads)
#pragma omp single
    for (long expert = 0; expert < p->experts; expert++) {
        long row = p->offsets[expert], rows = p->offsets[expert + 1] - row;
        Side grad_h = rows_at(g->grad_h + row * columns, 0, columns, 1), x = rows_at(p->x, p->token + row, hidden, 1);
        Side grad = rows_at(g->grad, p->token + row, hidden, 1), a = rows_at(g->a + row * width, 0, width, 1);
        for (long first = 0; g->grad_up.data && first < (g->grad_up.transposed ? hidden : columns); first += BLOCK)
#pragma omp task firstprivate(expert, first, rows, grad_h, x)
            matrix_gradient(
                g->grad_up, expert, first, grad_h, columns, x, hidden, rows, scratch + omp_get_thread_num() * scratch_size
            );
        for (long first = 0; g->grad_down.data && first < (g->grad_down.transposed ? width : hidden); first += BLOCK)
#pragma omp task firstprivate(expert, first, rows, grad, a)
            matrix_gradient(
                g->grad_down, expert, first, grad, hidden, a, width, rows, scratch + omp_get_thread_num() * scratch_size
            );
        if (g->grad_up_bias) bias_gradient(grad_h, 0, rows, columns, g->grad_up_bias + expert * columns);
        if (g->grad_down_bias) bias_gradient(grad, p->factor + row, rows, hidden, g->grad_down_bias + expert * hidden);
    }
    if (g->rows) combine(p, p->offsets[p->experts], g->rows, g->grad_x);
}

// ---- a few tokens: nothing is packed, each matrix is read once ------------------------------------------------------

// of rows sorted by expert: each one's state times its expert's matrix
static void project_few(
    const Problem *p, Side states, Matrices matrices, const Element *bias, long size, long depth, const long *ids, long served,
    Target target
) {
    long starts[FEW + 1], experts = 0, blocks = up_to(size, LANES) / LANES;
    for (long row = 0; row < served; row++)
        if (!row || ids[row] != ids[row - 1]) starts[experts++] = row;
    starts[experts] = served;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long task = 0; task < experts * blocks; task++) {
        long chosen = task / blocks, first = task % blocks * LANES, row = starts[chosen];
        Target to = target;
        to.bias = bias_of(bias, ids[row], size);
        few(
            states, row, starts[chosen + 1] - row, matrix(matrices, ids[row], 0), first, min(LANES, size - first), depth, to
        );
    }
}

// scratch: S * (H + C + I) words; the matrices are not transposed
void decode(const Problem *problem, const int64_t *index, const float *weight, float *rows, Element *output) {
    Problem p = *problem;
    Element *h = (Element *)(rows + p.tokens * p.top_k * p.hidden), *a = h + p.tokens * p.top_k * p.columns;
    long ids[FEW], slots[FEW], served = 0;
    int32_t token[FEW], place[FEW];
    float factor[FEW];
    for (long slot = 0; slot < p.tokens * p.top_k; slot++) {
        place[slot] = FEW;
        if (index[slot] < 0 || index[slot] >= p.experts) continue;
        long row = served++;
        for (; row > 0 && ids[row - 1] > index[slot]; row--) ids[row] = ids[row - 1], slots[row] = slots[row - 1];
        ids[row] = index[slot], slots[row] = slot;
    }
    for (long row = 0; row < served; row++) {
        token[row] = slots[row] / p.top_k, place[slots[row]] = row, factor[row] = weight[slots[row]];
    }
    p.place = place;
    Target to_h = {.element = h, .stride = p.columns}, to_rows = {.wide = rows, .stride = p.hidden, .factor = factor};
    project_few(&p, rows_at(p.x, token, p.hidden, 0), p.up, p.up_bias, p.columns, p.hidden, ids, served, to_h);
    for (long row = 0; row < served; row++)
        gate_forward(p.gate, h + row * p.columns, p.width, factor[row], a + row * p.width);
    project_few(&p, rows_at(a, 0, p.width, 0), p.down, p.down_bias, p.hidden, p.width, ids, served, to_rows);
    combine(&p, served, rows, output);
}
