// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
// Products of matrices, of which one side may be gathered, and the result added to lines picked by an index.

#pragma once

#include "numbers.h"

#define VECTORS 3
#define PANEL (VECTORS * LANES)   // columns of a tile
#define BLOCK 256                 // lines of the left side, and
#define DEPTH 512                 // words of a line, that are packed at once: they fit a second-level cache
#define VECTOR (PER_WORD * LANES) // numbers in a vector of words
#define UNPACKED (16 / PER_WORD)  // the most states for which reading a matrix takes longer than multiplying by it

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

// Where a product goes: `wide` or `element`, plus factor (a row's) times bias (a column's) if there is a bias. With an
// index a row belongs to line index[row]; `add` keeps what `wide` holds.
typedef struct {
    float *wide;
    Element *element;
    long stride;
    const Element *bias;
    const float *factor;
    const int32_t *index;
    int add;
} Target;

// ---- packing: a word of each line next to that of the other lines ----

// to[p * width + i]: word p of column first + i of a side that runs across, 0 beyond `count` columns
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
    long full = depth / VECTOR * LANES;  // words that are read without going beyond the end of a line
    for (long j = 0; j < width; j += LANES) {
        for (long i = 0; i < LANES && j + i < count; i++) {
            const char *line = (const char *)line_of(side, first + j + i);
            for (long p = 0; p < depth * (long)sizeof(Element); p += 64) __builtin_prefetch(line + p, 0, 2);
        }
        for (long p = 0; p < words(depth); p += LANES) {
            Words block[LANES];
            if (j + LANES <= count && p < full) {
                UNROLL
                for (int i = 0; i < LANES; i++) block[i] = load_words(line_of(side, first + j + i) + p * PER_WORD);
            } else {
                for (int i = 0; i < LANES; i++) {
                    Element rest[VECTOR] = {0};
                    long left = min(depth - p * PER_WORD, VECTOR) * sizeof(Element);
                    if (j + i < count) memcpy(rest, line_of(side, first + j + i) + p * PER_WORD, left);
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

// ---- tiles ----

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
    long start = (target.index ? target.index[row] : row) * target.stride + column, j = 0;
    const Element *bias = target.bias ? target.bias + column : 0;
    float factor = bias && target.factor ? target.factor[row] : 1;
    for (; j + LANES <= columns; j += LANES) {
        Floats sums = *(const Floats *)(line + j);
        if (bias) sums += factor * load(bias + j);
        if (target.add) sums += *(const Floats *)(target.wide + start + j);
        if (target.wide) *(Floats *)(target.wide + start + j) = sums;
        else store(target.element + start + j, sums);
    }
    for (; j < columns; j++) {
        float sum = bias ? line[j] + factor * widen(bias[j]) : line[j];
        if (target.add) sum += target.wide[start + j];
        if (target.wide) target.wide[start + j] = sum;
        else target.element[start + j] = narrow(sum);
    }
}

static void put(Target target, long row, long column, long rows, long columns, const float *tile, long width) {
    for (long i = 0; i < rows; i++) put_line(target, row + i, column, columns, tile + i * width);
}

// ---- a few states: nothing is packed, a matrix is read once, line after line, as memory likes to be read ----

// adds VECTOR numbers of a line times those of n states
INLINE void add_products(int n, const Element *line, const Element *const *states, long start, Floats *sums) {
    Words left = load_words(line + start);
    UNROLL
    for (int j = 0; j < n; j++) sums[j] = multiply_add(left, load_words(states[j] + start), sums[j]);
}

// sums[i * n + j]: line i times state j, LANES sums in all
INLINE Floats dots(int n, const Element *const *lines, const Element *const *states, long depth) {
    Floats sums[LANES];
    long done = depth / VECTOR * VECTOR;
    for (int i = 0; i < LANES / n; i++) {
        Floats own[4] = {0};
        for (long start = 0; start < done; start += VECTOR) add_products(n, lines[i], states, start, own);
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

// ---- many states ----

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

// of the next panel; not all that it holds if that left one of a single vector, which is slow
INLINE long panel_columns(long left) {
    return left > PANEL && left <= PANEL + LANES ? PANEL - LANES : min(left, PANEL);
}

// target (m, n) = left (m, depth) right (depth, n)
static void product(Side left, Side right, long m, long n, long depth, Word *scratch, Target target) {
    Word *panel = scratch + BLOCK * STRIDE;
    float *partial = (float *)(panel + PANEL * STRIDE), whole[ROWS * PANEL];
    long step = DEPTH * PER_WORD, stride = left.across ? BLOCK : STRIDE;
    for (long block = 0; block < m; block += BLOCK)
        for (long start = 0; start == 0 || start < depth; start += step) {
            long rows = min(BLOCK, m - block), part = min(step, depth - start);
            if (left.across) pack_across(from(left, start), block, rows, BLOCK, part, scratch);
            else pack_along(from(left, start), block, rows, part, STRIDE, scratch);
            for (long column = 0, columns; column < n; column += columns) {
                columns = panel_columns(n - column);
                long width = up_to(columns, LANES);
                if (right.across) pack_across(from(right, start), column, columns, width, part, panel);
                else pack_transposed(from(right, start), column, columns, width, part, panel);
                for (long i = 0; i < rows; i += ROWS) {
                    // the last tile reads lines that nobody packed, and only their own sums see them
                    const Word *lines = scratch + (left.across ? i : i * STRIDE);
                    float *tile = depth > step ? partial + (column * BLOCK + i * width) : whole;
                    multiply_block(left.across, width / LANES, lines, stride, panel, words(part), start == 0, tile);
                    if (start + step >= depth)
                        put(target, block + i, column, min(ROWS, rows - i), columns, tile, width);
                }
            }
        }
}
