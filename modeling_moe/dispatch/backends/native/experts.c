// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
//
// The experts on a CPU. Compiled for one dtype (ELEMENT) by compiling.py, called by __init__.py.
//
// T tokens, K experts per token, S = T*K slots, H hidden, I expert width, C columns of the first projection, E experts
// A row is a served slot, in the order of the experts; a chunk is up to BLOCK rows of one expert, a wave all W rows of
// some experts.
//
// A product reads its left side word by word and its right side in panels (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", ACM TOMS 34(3), 2008). No two threads add to the same number, and each is
// added up in one order, so the result does not depend on how many threads there are.

#include <omp.h>

#include "gate.h"
#include "products.h"

#define WAVE 4096  // rows of a wave for each thread

// one kind of expert matrix (E, N, M): `stride` lies between lines, which are rows, or columns if `transposed`
typedef struct {
    Element *data;
    long expert, stride, transposed;
} Matrices;

// a low-rank update b (a x) of W x, the scaling being in b; none if the rank is 0
typedef struct {
    Matrices a, b;                  // (E, R, M), (E, N, R)
    long rank;
    Element *narrow, *grad_narrow;  // a x of each row, and its gradient: (W, R), scratch
} LowRank;

// as __init__.py has it
typedef struct {
    const Element *x, *up_bias, *down_bias;
    const float *factor;             // of each row
    const int32_t *offsets, *token;  // E + 1; of each row
    long tokens, top_k, hidden, columns, width, experts, threads;
    Matrices up, down;
    Gate gate;
    LowRank low_up, low_down;
    long begin, end, first;  // of a wave: its experts, and its first row
} Problem;

// Goes on to the next wave, of experts that together keep all threads at work; 0 if there is none. What is (W, .) below
// is scratch that the next wave uses again.
static int next_wave(Problem *p) {
    p->begin = p->end;
    if (p->begin == p->experts) return 0;
    p->first = p->offsets[p->begin];
    do p->end++;
    while (p->end < p->experts && p->offsets[p->end + 1] - p->first <= p->threads * WAVE);
    return 1;
}

// W
long wave_rows(const Problem *p) {
    Problem wave = *p;
    long rows = 0;
    while (next_wave(&wave)) rows = max(rows, wave.offsets[wave.end] - wave.first);
    return rows;
}

// as the right side of states (., M) times its transpose, or of a gradient (., N) times it
static Side matrix(Matrices matrices, long expert, int back) {
    return (Side){matrices.data + expert * matrices.expert, 0, matrices.stride, matrices.transposed != back};
}

static Side rows_at(const Element *data, const int32_t *index, long stride, int across) {
    return (Side){data, index, stride, across};
}

INLINE const Element *bias_of(const Element *bias, long expert, long size) { return bias ? bias + expert * size : 0; }

// One thread's scratch: of products, then of a chunk h, h before it is rounded, and dO W2.
static long product_words(const Problem *p) {
    return product_scratch(max(max(p->hidden, p->columns), max(p->low_up.rank, p->low_down.rank)));
}

long scratch_words(const Problem *p) { return product_words(p) + BLOCK * (2 * p->columns + p->width); }

static Element *own_h(const Problem *p, Word *scratch) { return (Element *)(scratch + product_words(p)); }

static float *wide_h(const Problem *p, Word *scratch) {
    return (float *)(scratch + product_words(p) + BLOCK * p->columns);
}

static float *own_back(const Problem *p, Word *scratch) { return wide_h(p, scratch) + BLOCK * p->columns; }

// target (rows, n): states, which are rows of one expert, times a matrix
static void apply(
    const Problem *p, long expert, Side states, Side lines, long rows, long n, long depth, Word *scratch, Target target
) {
    int many = p->offsets[expert + 1] - p->offsets[expert] > UNPACKED;
    if (many || lines.across) product(states, lines, rows, n, depth, scratch, target);
    else
        for (long first = 0; first < n; first += LANES)
            few(states, 0, rows, lines, first, min(LANES, n - first), depth, target);
}

// a x of states, or bᵀ of a gradient if `back`
static void narrow_rows(
    const Problem *p, const LowRank *low, int back, long expert, Side states, long row, long rows, long depth,
    Word *scratch
) {
    Element *to = (back ? low->grad_narrow : low->narrow) + (row - p->first) * low->rank;
    Target target = {.element = to, .stride = low->rank};
    Side lines = matrix(back ? low->b : low->a, expert, back);
    apply(p, expert, states, lines, rows, low->rank, depth, scratch, target);
}

// adds what the update makes of narrow rows to target (rows, n)
static void widen_rows(
    const Problem *p, const LowRank *low, int back, long expert, long row, long rows, Side lines, long n,
    Word *scratch, Target target
) {
    Side narrow = rows_at((back ? low->grad_narrow : low->narrow) + (row - p->first) * low->rank, 0, low->rank, 0);
    apply(p, expert, narrow, lines, rows, n, low->rank, scratch, target);
}

static void project_up(const Problem *p, long expert, long row, long rows, Word *scratch, Element *h) {
    long columns = p->columns;
    const LowRank *low = &p->low_up;
    Side states = rows_at(p->x, p->token + row, p->hidden, 0);
    Target target = {.element = h, .stride = columns, .bias = bias_of(p->up_bias, expert, columns)};
    if (low->rank) target.element = 0, target.wide = wide_h(p, scratch);
    apply(p, expert, states, matrix(p->up, expert, 0), rows, columns, p->hidden, scratch, target);
    if (!low->rank) return;
    narrow_rows(p, low, 0, expert, states, row, rows, p->hidden, scratch);
    Target more = {.wide = target.wide, .stride = columns, .add = 1};
    widen_rows(p, low, 0, expert, row, rows, matrix(low->b, expert, 0), columns, scratch, more);
    for (long i = 0; i < rows * columns; i++) h[i] = narrow(target.wide[i]);
}

// runs `work` on all chunks: of BLOCK rows, or fewer where that leaves threads without work
typedef void Work(const Problem *, const void *, long expert, long row, long rows, Word *scratch);

static void run_chunks(const Problem *p, Work *work, const void *argument, Word *scratch, long scratch_size) {
    long share = (p->offsets[p->end] - p->first) / (2 * p->threads), step = max(ROWS, min(BLOCK, up_to(share, ROWS)));
#pragma omp parallel num_threads(p->threads)
#pragma omp single
    for (long expert = p->begin; expert < p->end; expert++)
        for (long row = p->offsets[expert]; row < p->offsets[expert + 1]; row += step) {
            long rows = min(step, p->offsets[expert + 1] - row);
#pragma omp task firstprivate(expert, row, rows)
            work(p, argument, expert, row, rows, scratch + omp_get_thread_num() * scratch_size);
        }
}

// the first row of an expert whose token is not before `token`; an expert's rows are in the order of their tokens
static long first_row(const Problem *p, long expert, long token) {
    long low = p->offsets[expert], high = p->offsets[expert + 1];
    while (low < high) {
        long middle = (low + high) / 2;
        if (p->token[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low;
}

// what each row adds to its token: states (W, depth) times the expert's matrix, or its transpose if `back`
typedef struct {
    const Element *states;
    long depth;
    Matrices matrices;
    const LowRank *low;
    int back;
    const Element *bias;
} Addend;

static Side columns_from(Side right, long first) {
    right.data += first * (right.across ? 1 : right.stride);
    return right;
}

// Adds to columns [first, first + count) of tokens [from, to) of sums (T, n), expert after expert.
static void add_part(
    const Problem *p, const Addend *addend, long n, long first, long count, long from, long to, Word *scratch,
    float *sums
) {
    for (long expert = p->begin; expert < p->end; expert++) {
        long row = first_row(p, expert, from), rows = first_row(p, expert, to) - row;
        Side states = rows_at(addend->states + (row - p->first) * addend->depth, 0, addend->depth, 0);
        Side lines = columns_from(matrix(addend->matrices, expert, addend->back), first);
        const Element *bias = addend->bias ? addend->bias + expert * n + first : 0;
        Target target = {sums + first, 0, n, bias, p->factor + row, p->token + row, 1};
        apply(p, expert, states, lines, rows, count, addend->depth, scratch, target);
        const LowRank *low = addend->low;
        if (!low->rank) continue;
        lines = columns_from(matrix(addend->back ? low->a : low->b, expert, addend->back), first);
        target.bias = 0;
        widen_rows(p, low, addend->back, expert, row, rows, lines, count, scratch, target);
    }
}

// to sums (T, n): a thread takes some columns of some tokens, so no two add to the same number
static void add_up(const Problem *p, const Addend *addend, long n, Word *scratch, long scratch_size, float *sums) {
    long pieces = p->threads, groups = max(1, min(pieces, n / 128)), ranges = up_to(pieces, groups) / groups;
    long size = up_to(up_to(n, groups) / groups, LANES);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(p->threads)
    for (long range = 0; range < ranges; range++)
        for (long first = 0; first < n; first += size) {
            long from = p->tokens * range / ranges, to = p->tokens * (range + 1) / ranges;
            Word *own = scratch + omp_get_thread_num() * scratch_size;
            add_part(p, addend, n, first, min(size, n - first), from, to, own, sums);
        }
}

// h (S, C), or null if nobody wants it, and a = gate(h) * factor (W, I), which is scratch
typedef struct {
    Element *h, *a;
} Activations;

static void forward_chunk(const Problem *p, const void *to, long expert, long row, long rows, Word *scratch) {
    const Activations *activations = to;
    long columns = p->columns, width = p->width;
    Element *h = activations->h ? activations->h + row * columns : own_h(p, scratch);
    Element *a = activations->a + (row - p->first) * width;
    project_up(p, expert, row, rows, scratch, h);
    for (long i = 0; i < rows; i++) gate_forward(p->gate, h + i * columns, width, p->factor[row + i], a + i * width);
    if (p->low_down.rank)
        narrow_rows(p, &p->low_down, 0, expert, rows_at(a, 0, width, 0), row, rows, width, scratch);
}

// output (T, H), which is 0
void forward(const Problem *p, Word *scratch, long scratch_size, Element *h, Element *a, float *output) {
    Activations activations = {h, a};
    Addend outputs = {a, p->width, p->down, &p->low_down, 0, p->down_bias};
    for (Problem wave = *p; next_wave(&wave);) {
        run_chunks(&wave, forward_chunk, &activations, scratch, scratch_size);
        add_up(&wave, &outputs, p->hidden, scratch, scratch_size, output);
    }
}

// what backward writes; null where it is not wanted, but for grad_h and a, which are scratch
typedef struct {
    const Element *grad, *h;                 // of the output (T, H); h (S, C), or null to compute it again
    Element *grad_h, *a;                     // (W, C), (W, I)
    float *slope, *grad_x;                   // (S,), of each row's factor; (T, H), which is 0
    Matrices grad_up, grad_down;             // (E, C, H), (E, H, I)
    Element *grad_up_bias, *grad_down_bias;  // (E, C), (E, H)
    Matrices up_a, up_b, down_a, down_b;     // of the low-rank updates
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

static void backward_chunk(const Problem *p, const void *to, long expert, long row, long rows, Word *scratch) {
    const Gradients *g = to;
    long hidden = p->hidden, columns = p->columns, width = p->width;
    const int32_t *token = p->token + row;
    Element *own_a = g->a + (row - p->first) * width, *own_grad_h = g->grad_h + (row - p->first) * columns;
    float *back = own_back(p, scratch);  // dO W2
    const Element *h = g->h ? g->h + row * columns : own_h(p, scratch);
    const LowRank *up = &p->low_up, *down = &p->low_down;
    Side grad = rows_at(g->grad, token, hidden, 0);
    Target to_back = {.wide = back, .stride = width};
    apply(p, expert, grad, matrix(p->down, expert, 1), rows, width, hidden, scratch, to_back);
    if (down->rank) {
        narrow_rows(p, down, 1, expert, grad, row, rows, hidden, scratch);
        to_back.add = 1;
        widen_rows(p, down, 1, expert, row, rows, matrix(down->a, expert, 1), width, scratch, to_back);
    }
    if (!g->h) project_up(p, expert, row, rows, scratch, own_h(p, scratch));
    else if (g->up_b.data)
        narrow_rows(p, up, 0, expert, rows_at(p->x, token, hidden, 0), row, rows, hidden, scratch);
    for (long i = 0; i < rows; i++) {
        Element *a = own_a + i * width, *grad_h = own_grad_h + i * columns;
        float slope = gate_backward(p->gate, h + i * columns, back + i * width, width, p->factor[row + i], a, grad_h);
        if (!g->slope) continue;
        if (p->down_bias) slope += dot(line_of(grad, i), p->down_bias + expert * hidden, hidden);
        g->slope[row + i] = slope;
    }
    if (up->rank)
        narrow_rows(p, up, 1, expert, rows_at(own_grad_h, 0, columns, 0), row, rows, columns, scratch);
    if (g->down_b.data)
        narrow_rows(p, down, 0, expert, rows_at(own_a, 0, width, 0), row, rows, width, scratch);
}

// leftᵀ right over an expert's rows, where both lie across: (n, m), or its transpose where `to` is transposed
static void matrix_gradient(
    Matrices to, long expert, Side left, long n, Side right, long m, long rows, Word *scratch, long scratch_size
) {
    if (!to.data) return;
    Side first = to.transposed ? right : left, second = to.transposed ? left : right;
    long lines = to.transposed ? m : n, length = to.transposed ? n : m;
    for (long start = 0; start < lines; start += BLOCK) {
        Side part = first;
        part.data += start;
        Target target = {.element = to.data + expert * to.expert + start * to.stride, .stride = to.stride};
#pragma omp task firstprivate(part, second, target, start)
        {
            Word *own = scratch + omp_get_thread_num() * scratch_size;
            product(part, second, min(BLOCK, lines - start), length, rows, own, target);
        }
    }
}

// of a and b of an update from m to n numbers, given the gradient of its output and its input
static void low_rank_gradients(
    const Problem *p, const LowRank *low, Matrices a, Matrices b, long expert, Side grad, long n, Side states, long m,
    Word *scratch, long scratch_size
) {
    if (!low->rank) return;
    long row = p->offsets[expert], rows = p->offsets[expert + 1] - row, rank = low->rank;
    Side narrow = rows_at(low->narrow + (row - p->first) * rank, 0, rank, 1);
    Side grad_narrow = rows_at(low->grad_narrow + (row - p->first) * rank, 0, rank, 1);
    matrix_gradient(a, expert, grad_narrow, rank, states, m, rows, scratch, scratch_size);
    matrix_gradient(b, expert, grad, n, narrow, rank, rows, scratch, scratch_size);
}

static void parameter_gradients(const Problem *p, const Gradients *g, Word *scratch, long scratch_size) {
    long hidden = p->hidden, columns = p->columns, width = p->width;
#pragma omp parallel num_threads(p->threads)
#pragma omp single
    for (long expert = p->begin; expert < p->end; expert++) {
        long row = p->offsets[expert], rows = p->offsets[expert + 1] - row, place = row - p->first;
        Side grad_h = rows_at(g->grad_h + place * columns, 0, columns, 1);
        Side a = rows_at(g->a + place * width, 0, width, 1);
        Side grad = rows_at(g->grad, p->token + row, hidden, 1), x = rows_at(p->x, p->token + row, hidden, 1);
        matrix_gradient(g->grad_up, expert, grad_h, columns, x, hidden, rows, scratch, scratch_size);
        matrix_gradient(g->grad_down, expert, grad, hidden, a, width, rows, scratch, scratch_size);
        const LowRank *up = &p->low_up, *down = &p->low_down;
        low_rank_gradients(p, up, g->up_a, g->up_b, expert, grad_h, columns, x, hidden, scratch, scratch_size);
        low_rank_gradients(p, down, g->down_a, g->down_b, expert, grad, hidden, a, width, scratch, scratch_size);
        if (g->grad_up_bias) bias_gradient(grad_h, 0, rows, columns, g->grad_up_bias + expert * columns);
        if (g->grad_down_bias) bias_gradient(grad, p->factor + row, rows, hidden, g->grad_down_bias + expert * hidden);
    }
}

void backward(const Problem *p, Word *scratch, long scratch_size, const Gradients *g) {
    Addend grad_states = {g->grad_h, p->columns, p->up, &p->low_up, 1, 0};
    for (Problem wave = *p; next_wave(&wave);) {
        run_chunks(&wave, backward_chunk, g, scratch, scratch_size);
        parameter_gradients(&wave, g, scratch, scratch_size);
        if (g->grad_x) add_up(&wave, &grad_states, p->hidden, scratch, scratch_size, g->grad_x);
    }
}

// ---- a few tokens ----

#define FEW 256  // the most slots, as interface.py has it

// the rows of a few tokens, sorted by expert, and where each expert's start
typedef struct {
    long count, experts, id[FEW], slot[FEW], start[FEW + 1];
    int32_t token[FEW];
    float factor[FEW];
} Rows;

static Rows sort_few(const Problem *p, const int64_t *index, const float *weight) {
    Rows r = {0};
    for (long slot = 0; slot < p->tokens * p->top_k; slot++) {
        if (index[slot] < 0 || index[slot] >= p->experts) continue;
        long row = r.count++;
        for (; row > 0 && r.id[row - 1] > index[slot]; row--)
            r.id[row] = r.id[row - 1], r.slot[row] = r.slot[row - 1];
        r.id[row] = index[slot], r.slot[row] = slot;
    }
    for (long row = 0; row < r.count; row++) {
        r.token[row] = r.slot[row] / p->top_k, r.factor[row] = weight[r.slot[row]];
        if (!row || r.id[row] != r.id[row - 1]) r.start[r.experts++] = row;
    }
    r.start[r.experts] = r.count;
    return r;
}

// output (T, H); scratch of T * H + S * (C + I) words; the matrices are not transposed
void decode(const Problem *p, const int64_t *index, const float *weight, float *scratch, Element *output) {
    Rows r = sort_few(p, index, weight);
    long columns = p->columns, hidden = p->hidden, blocks = up_to(columns, LANES) / LANES, size = p->tokens * hidden;
    float *sums = memset(scratch, 0, size * sizeof(float));
    Element *h = (Element *)(sums + size), *a = h + r.count * columns;
#pragma omp parallel for num_threads(p->threads)
    for (long task = 0; task < r.experts * blocks; task++) {
        long row = r.start[task / blocks], rows = r.start[task / blocks + 1] - row, first = task % blocks * LANES;
        Target target = {.element = h, .stride = columns, .bias = bias_of(p->up_bias, r.id[row], columns)};
        Side states = rows_at(p->x, r.token, hidden, 0), lines = matrix(p->up, r.id[row], 0);
        few(states, row, rows, lines, first, min(LANES, columns - first), hidden, target);
    }
    for (long row = 0; row < r.count; row++)
        gate_forward(p->gate, h + row * columns, p->width, r.factor[row], a + row * p->width);
#pragma omp parallel for num_threads(p->threads)
    for (long first = 0; first < hidden; first += LANES)
        for (long chosen = 0; chosen < r.experts; chosen++) {
            long row = r.start[chosen], rows = r.start[chosen + 1] - row;
            const Element *bias = bias_of(p->down_bias, r.id[row], hidden);
            Target target = {sums, 0, hidden, bias, r.factor, r.token, 1};
            Side states = rows_at(a, 0, p->width, 0), lines = matrix(p->down, r.id[row], 0);
            few(states, row, rows, lines, first, min(LANES, hidden - first), p->width, target);
        }
    for (long i = 0; i < size; i++) output[i] = narrow(sums[i]);
}
