// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
// This file multiplies matrices. Lines of an operand may be gathered by an index, and rows of the result may be added
// to lines that an index picks.

#pragma once

#include "vectors.h"

#define VECTORS 3
#define PANEL (VECTORS * LANES)   // columns of a tile
#define BLOCK 256                 // lines of the left operand that are packed at once
#define DEPTH 512                 // words of a line that are packed at once: BLOCK x DEPTH fits a second-level cache
#define VECTOR (PER_WORD * LANES) // elements in a vector of words
#define UNPACKED (16 / PER_WORD)  // the most rows for which reading a matrix takes longer than multiplying by it

// Operand is one side of a product: lines of contiguous elements.
//   data    the first line
//   index   line i is line index[i] of the data; null for line i itself
//   stride  elements between the starts of two lines
//   across  0 if a line runs along the summed dimension, 1 if each line is one position of it
typedef struct {
    const Element *data;
    const int32_t *index;
    long stride;
    int across;
} Operand;

// line_of returns the start of a line.
INLINE const Element *line_of(Operand operand, long line) {
    return operand.data + (operand.index ? operand.index[line] : line) * operand.stride;
}

// Target is where a product is stored: in floats if `floats` is given, else in elements.
//   stride  numbers between the starts of two lines
//   bias    (columns,) is added to each row, times factor[row] if `factor` is given; null for none
//   index   row i is stored in line index[i]; null for line i itself
//   add     1 to add to what `floats` holds
typedef struct {
    float *floats;
    Element *element;
    long stride;
    const Element *bias;
    const float *factor;
    const int32_t *index;
    int add;
} Target;

// ---- packing: the words of several lines that are multiplied together become neighbours in memory ----

// pack_across copies columns [first, first + count) of an operand that runs across.
//   to  (words(depth), width): to[p * width + i] is word p of column first + i, and 0 for i >= count
static void pack_across(Operand operand, long first, long count, long width, long depth, Word *to) {
    for (long p = 0; p < words(depth); p++, to += width) {
        const Element *line = line_of(operand, p * PER_WORD) + first;
#if PER_WORD == 2
        if (p * 2 + 1 < depth) {
            const Element *next = line_of(operand, p * 2 + 1) + first;
            for (long i = 0; i < count; i++) to[i] = line[i] | (Word)next[i] << 16;
        } else {
            for (long i = 0; i < count; i++) to[i] = line[i];
        }
#else
        for (long i = 0; i < count; i++) to[i] = to_float(line[i]);
#endif
        for (long i = count; i < width; i++) to[i] = 0;
    }
}

// pack_along copies lines [first, first + count) of an operand that runs along.
//   to  (count, stride): to[i * stride + p] is word p of line first + i
static void pack_along(Operand operand, long first, long count, long depth, long stride, Word *to) {
    for (long i = 0; i < count; i++, to += stride) {
        const Element *line = line_of(operand, first + i);
#if PER_WORD == 2
        to[words(depth) - 1] = 0;
        memcpy(to, line, depth * sizeof(Element));
#else
        for (long p = 0; p < depth; p++) to[p] = to_float(line[p]);
#endif
    }
}

// transpose transposes LANES x LANES words in registers: in step s, blocks of s x s beside the diagonal change places.
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

// pack_transposed writes the result of pack_across from an operand whose lines run along.
//   to  (words(depth), width)
static void pack_transposed(Operand operand, long first, long count, long width, long depth, Word *to) {
    long full = depth / VECTOR * LANES;  // whole vectors can be read up to this word
    for (long j = 0; j < width; j += LANES) {
        for (long i = 0; i < LANES && j + i < count; i++) {
            const char *line = (const char *)line_of(operand, first + j + i);
            for (long p = 0; p < depth * (long)sizeof(Element); p += 64) __builtin_prefetch(line + p, 0, 2);
        }
        for (long p = 0; p < words(depth); p += LANES) {
            Words block[LANES];
            if (j + LANES <= count && p < full) {
                UNROLL
                for (int i = 0; i < LANES; i++) block[i] = load_words(line_of(operand, first + j + i) + p * PER_WORD);
            } else {
                for (int i = 0; i < LANES; i++) {
                    Element rest[VECTOR] = {0};
                    long left = min(depth - p * PER_WORD, VECTOR) * sizeof(Element);
                    if (j + i < count) memcpy(rest, line_of(operand, first + j + i) + p * PER_WORD, left);
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

// multiply_tile computes tile (ROWS, vectors * LANES) += left (ROWS, depth) panel (depth, vectors * LANES).
//   left   word p of line i is left[i * line + p * step]
//   first  1 to start from 0 instead of from the tile
INLINE void multiply_tile(
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

// multiply_tile_of calls multiply_tile with constants, so that its loops are unrolled.
//   across  1 if the left operand was packed by pack_across
static void multiply_tile_of(
    int across, int vectors, const Word *left, long stride, const Word *panel, long depth, int first, float *tile
) {
    if (across) {
        if (vectors == 3) multiply_tile(3, left, 1, stride, panel, depth, first, tile);
        else if (vectors == 2) multiply_tile(2, left, 1, stride, panel, depth, first, tile);
        else multiply_tile(1, left, 1, stride, panel, depth, first, tile);
    } else {
        if (vectors == 3) multiply_tile(3, left, stride, 1, panel, depth, first, tile);
        else if (vectors == 2) multiply_tile(2, left, stride, 1, panel, depth, first, tile);
        else multiply_tile(1, left, stride, 1, panel, depth, first, tile);
    }
}

// store_line stores the first `columns` numbers of a tile's line at (row, column) of the target.
INLINE void store_line(Target target, long row, long column, long columns, const float *line) {
    long start = (target.index ? target.index[row] : row) * target.stride + column, j = 0;
    const Element *bias = target.bias ? target.bias + column : 0;
    float factor = bias && target.factor ? target.factor[row] : 1;
    for (; j + LANES <= columns; j += LANES) {
        Floats sums = *(const Floats *)(line + j);
        if (bias) sums += factor * load(bias + j);
        if (target.add) sums += *(const Floats *)(target.floats + start + j);
        if (target.floats) *(Floats *)(target.floats + start + j) = sums;
        else store(target.element + start + j, sums);
    }
    for (; j < columns; j++) {
        float sum = bias ? line[j] + factor * to_float(bias[j]) : line[j];
        if (target.add) sum += target.floats[start + j];
        if (target.floats) target.floats[start + j] = sum;
        else target.element[start + j] = from_float(sum);
    }
}

// store_tile stores a tile (rows, columns), whose lines are `width` apart, at (row, column) of the target.
static void store_tile(Target target, long row, long column, long rows, long columns, const float *tile, long width) {
    for (long i = 0; i < rows; i++) store_line(target, row + i, column, columns, tile + i * width);
}

// ---- few rows: nothing is packed, and the matrix is read once, line after line ----

// add_products adds the products of VECTOR elements of a line with those of n rows to n sums.
INLINE void add_products(int n, const Element *line, const Element *const *states, long start, Floats *sums) {
    Words left = load_words(line + start);
    UNROLL
    for (int j = 0; j < n; j++) sums[j] = multiply_add(left, load_words(states[j] + start), sums[j]);
}

// dots returns LANES dot products of length `depth`: number i * n + j is line i times row j.
INLINE Floats dots(int n, const Element *const *lines, const Element *const *states, long depth) {
    Floats sums[LANES];
    long done = depth / VECTOR * VECTOR;
    for (int i = 0; i < LANES / n; i++) {
        Floats sums_of_line[4] = {0};
        for (long start = 0; start < done; start += VECTOR) add_products(n, lines[i], states, start, sums_of_line);
        if (done < depth) {
            Element rest[5][VECTOR] = {0};
            const Element *state[4];
            memcpy(rest[4], lines[i] + done, (depth - done) * sizeof(Element));
            for (int j = 0; j < n; j++) state[j] = memcpy(rest[j], states[j] + done, (depth - done) * sizeof(Element));
            add_products(n, rest[4], state, 0, sums_of_line);
        }
        UNROLL
        for (int j = 0; j < n; j++) sums[i * n + j] = sums_of_line[j];
    }
    transpose((Words *)sums);
    UNROLL
    for (int i = 1; i < LANES; i++) sums[0] += sums[i];
    return sums[0];
}

// dot_tile computes tile (n, LANES): n rows times LANES lines.
INLINE void dot_tile(int n, const Element *const *lines, const Element *const *states, long depth, float *tile) {
    for (int i = 0; i < LANES; i += LANES / n) {
        Floats sums = dots(n, lines + i, states, depth);
        UNROLL
        for (int c = 0; c < LANES; c++) tile[c % n * LANES + i + c / n] = sums[c];
    }
}

// multiply_few_rows computes rows [row, row + rows) and columns [first, first + count) of the target, count <= LANES.
//   states  the rows (., depth)
//   lines   the matrix (., depth), whose lines give the columns
static void multiply_few_rows(
    Operand states, long row, long rows, Operand lines, long first, long count, long depth, Target target
) {
    const Element *line[LANES], *state[4];
    for (long i = 0; i < LANES; i++) line[i] = line_of(lines, first + min(i, count - 1));
    for (long done = 0; done < rows;) {
        long left = rows - done, n = left >= 3 ? 4 : left;
        float tile[4 * LANES];
        for (long j = 0; j < n; j++) state[j] = line_of(states, row + min(done + j, rows - 1));
        if (n == 4) dot_tile(4, line, state, depth, tile);
        else if (n == 2) dot_tile(2, line, state, depth, tile);
        else dot_tile(1, line, state, depth, tile);
        store_tile(target, row + done, first, min(n, left), count, tile, LANES);
        done += n;
    }
}

// ---- many rows ----

// operand_from returns the operand from position `start` of the summed dimension on.
static Operand operand_from(Operand operand, long start) {
    if (!operand.across) operand.data += start;
    else if (operand.index) operand.index += start;
    else operand.data += start * operand.stride;
    return operand;
}

// STRIDE words lie between packed lines: one cache line more than DEPTH, or the lines would evict each other.
#define STRIDE (DEPTH + LANES)

// matmul_scratch_words counts the words of scratch for a product with up to n columns: both packed operands, and
// partial sums.
INLINE long matmul_scratch_words(long n) { return (BLOCK + PANEL) * STRIDE + BLOCK * up_to(n, PANEL); }

// panel_columns returns the columns of the next panel, given those that are left. It avoids to leave a single vector,
// which is slow.
INLINE long panel_columns(long left) {
    return left > PANEL && left <= PANEL + LANES ? PANEL - LANES : min(left, PANEL);
}

// matmul computes target (m, n) = left (m, depth) right (depth, n).
//   scratch  matmul_scratch_words(n) words
static void matmul(Operand left, Operand right, long m, long n, long depth, Word *scratch, Target target) {
    Word *panel = scratch + BLOCK * STRIDE;
    float *partial = (float *)(panel + PANEL * STRIDE), whole[ROWS * PANEL];
    long step = DEPTH * PER_WORD, stride = left.across ? BLOCK : STRIDE;
    for (long block = 0; block < m; block += BLOCK)
        for (long start = 0; start == 0 || start < depth; start += step) {
            long rows = min(BLOCK, m - block), part = min(step, depth - start);
            if (left.across) pack_across(operand_from(left, start), block, rows, BLOCK, part, scratch);
            else pack_along(operand_from(left, start), block, rows, part, STRIDE, scratch);
            for (long column = 0, columns; column < n; column += columns) {
                columns = panel_columns(n - column);
                long width = up_to(columns, LANES);
                if (right.across) pack_across(operand_from(right, start), column, columns, width, part, panel);
                else pack_transposed(operand_from(right, start), column, columns, width, part, panel);
                for (long i = 0; i < rows; i += ROWS) {
                    // the last tile reads lines that were not packed; their sums are not stored
                    const Word *lines = scratch + (left.across ? i : i * STRIDE);
                    float *tile = depth > step ? partial + (column * BLOCK + i * width) : whole;
                    multiply_tile_of(left.across, width / LANES, lines, stride, panel, words(part), start == 0, tile);
                    if (start + step >= depth)
                        store_tile(target, block + i, column, min(ROWS, rows - i), columns, tile, width);
                }
            }
        }
}
