// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
//
// This file computes the experts on a CPU. compiling.py compiles it for one dtype (ELEMENT), structures.py describes
// its structures to Python, and __init__.py calls it.
//
// T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
// C columns of the first projection: 2I for gated experts, else I; R rank of a low-rank update
// A row is an assignment that has an expert; rows are in expert order. A chunk is up to BLOCK rows of one expert. A
// wave is the W rows of some consecutive experts.
//
// A product reads its left operand word by word and its right operand in panels (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", ACM TOMS 34(3), 2008). No two threads add to the same number, and each
// number is added up in one order, so the result does not depend on the number of threads.

#include <omp.h>

#include "activation.h"
#include "matmul.h"

#define WAVE 4096  // rows of a wave for each thread

// Matrices is one kind of expert matrix (E, N, M); null data for none.
//   expert      elements between two experts
//   stride      elements between two lines
//   transposed  0 if lines are rows (M contiguous), 1 if lines are columns (N contiguous)
//   slots       (E,) the place of each expert's matrix, or null if expert e lies at e
typedef struct {
    Element *data;
    long expert, stride, transposed;
    const int32_t *slots;
} Matrices;

// LowRank adds b (a x) to a product W x; b carries the scaling. A rank of 0 means no update.
//   a            (E, R, M)
//   b            (E, N, R)
//   states       (W, R) scratch: a x of each row
//   grad_states  (W, R) scratch: the gradient of a x
typedef struct {
    Matrices a, b;
    long rank;
    Element *states, *grad_states;
} LowRank;

// Problem is what the experts of one layer compute with.
//   x           (T, H) tokens
//   up_bias     (E, C) or null; like the matrices, biases lie at the places that up.slots gives
//   down_bias   (E, H) or null
//   factor      the combine weight of each row
//   offsets     (E + 1,) expert e owns the rows from offsets[e] to offsets[e + 1]
//   token       the token of each row
//   up          (E, C, H)
//   down        (E, H, I)
//   begin, end  the experts of the current wave
//   first       the first row of the current wave
typedef struct {
    const Element *x, *up_bias, *down_bias;
    const float *factor;
    const int32_t *offsets, *token;
    long tokens, top_k, hidden, columns, width, experts, threads;
    Matrices up, down;
    Activation activation;
    LowRank up_update, down_update;
    long begin, end, first;
} Problem;

// next_wave goes on to the next wave: as many experts as keep all threads at work. It returns 0 if no expert is left.
// Tensors (W, .) are scratch that each wave uses again.
static int next_wave(Problem *p) {
    p->begin = p->end;
    if (p->begin == p->experts) return 0;
    p->first = p->offsets[p->begin];
    do p->end++;
    while (p->end < p->experts && p->offsets[p->end + 1] - p->first <= p->threads * WAVE);
    return 1;
}

// wave_rows returns W: the rows of the largest wave.
long wave_rows(const Problem *p) {
    Problem wave = *p;
    long rows = 0;
    while (next_wave(&wave)) rows = max(rows, wave.offsets[wave.end] - wave.first);
    return rows;
}

// place_of returns where an expert's matrix lies among the matrices.
INLINE long place_of(Matrices matrices, long expert) { return matrices.slots ? matrices.slots[expert] : expert; }

// matrix_operand returns one expert's matrix (N, M) as the right operand of a product.
//   backward  0 for states (., M) times its transpose, 1 for gradients (., N) times the matrix
static Operand matrix_operand(Matrices matrices, long expert, int backward) {
    const Element *data = matrices.data + place_of(matrices, expert) * matrices.expert;
    return (Operand){data, 0, matrices.stride, matrices.transposed != backward};
}

// rows_operand returns rows as the left operand of a product, or as either operand, if `across`, of a sum over rows.
static Operand rows_operand(const Element *data, const int32_t *index, long stride, int across) {
    return (Operand){data, index, stride, across};
}

// bias_of returns one expert's bias of (E, size), or null.
INLINE const Element *bias_of(const Problem *p, const Element *bias, long expert, long size) {
    return bias ? bias + place_of(p->up, expert) * size : 0;
}

// A thread's scratch holds that of its products, then three tensors of its chunk: h (BLOCK, C), h in floats (BLOCK, C)
// and the gradient dO W2 of a (BLOCK, I) in floats.
static long matmul_words(const Problem *p) {
    return matmul_scratch_words(max(max(p->hidden, p->columns), max(p->up_update.rank, p->down_update.rank)));
}

// scratch_words counts the words of one thread's scratch.
long scratch_words(const Problem *p) { return matmul_words(p) + BLOCK * (2 * p->columns + p->width); }

static Element *chunk_h(const Problem *p, Word *scratch) { return (Element *)(scratch + matmul_words(p)); }

static float *chunk_h_float(const Problem *p, Word *scratch) {
    return (float *)(scratch + matmul_words(p) + BLOCK * p->columns);
}

static float *chunk_grad_a(const Problem *p, Word *scratch) { return chunk_h_float(p, scratch) + BLOCK * p->columns; }

// matmul_rows computes target (rows, n) = states (rows, depth) times one expert's matrix (depth, n). The way that it is
// computed depends on all rows of the expert, not on `rows`, so that chunks do not change the result.
static void matmul_rows(
    const Problem *p, long expert, Operand states, Operand lines, long rows, long n, long depth, Word *scratch,
    Target target
) {
    int many = p->offsets[expert + 1] - p->offsets[expert] > UNPACKED;
    if (many || lines.across) matmul(states, lines, rows, n, depth, scratch, target);
    else
        for (long first = 0; first < n; first += LANES)
            multiply_few_rows(states, 0, rows, lines, first, min(LANES, n - first), depth, target);
}

// project_to_rank computes low->states (rows, R) = states (rows, depth) aᵀ, or if `backward`
// low->grad_states (rows, R) = states (rows, depth) b, where the states are gradients.
static void project_to_rank(
    const Problem *p, const LowRank *low, int backward, long expert, Operand states, long row, long rows, long depth,
    Word *scratch
) {
    Element *to = (backward ? low->grad_states : low->states) + (row - p->first) * low->rank;
    Target target = {.element = to, .stride = low->rank};
    Operand lines = matrix_operand(backward ? low->b : low->a, expert, backward);
    matmul_rows(p, expert, states, lines, rows, low->rank, depth, scratch, target);
}

// add_from_rank computes target (rows, n) = low->states (rows, R) lines (R, n), or with low->grad_states if `backward`.
// The caller sets target.add.
static void add_from_rank(
    const Problem *p, const LowRank *low, int backward, long expert, long row, long rows, Operand lines, long n,
    Word *scratch, Target target
) {
    const Element *data = (backward ? low->grad_states : low->states) + (row - p->first) * low->rank;
    Operand rank_states = rows_operand(data, 0, low->rank, 0);
    matmul_rows(p, expert, rank_states, lines, rows, n, low->rank, scratch, target);
}

// project_up computes h (rows, C) of rows [row, row + rows).
static void project_up(const Problem *p, long expert, long row, long rows, Word *scratch, Element *h) {
    long columns = p->columns;
    const LowRank *low = &p->up_update;
    Operand states = rows_operand(p->x, p->token + row, p->hidden, 0);
    Target target = {.element = h, .stride = columns, .bias = bias_of(p, p->up_bias, expert, columns)};
    if (low->rank) target.element = 0, target.floats = chunk_h_float(p, scratch);
    matmul_rows(p, expert, states, matrix_operand(p->up, expert, 0), rows, columns, p->hidden, scratch, target);
    if (!low->rank) return;
    project_to_rank(p, low, 0, expert, states, row, rows, p->hidden, scratch);
    Target more = {.floats = target.floats, .stride = columns, .add = 1};
    add_from_rank(p, low, 0, expert, row, rows, matrix_operand(low->b, expert, 0), columns, scratch, more);
    for (long i = 0; i < rows * columns; i++) h[i] = from_float(target.floats[i]);
}

// ChunkWork is a function of rows [row, row + rows) of one expert.
//   scratch  the scratch of the thread
typedef void ChunkWork(const Problem *, const void *, long expert, long row, long rows, Word *scratch);

// run_chunks calls `work` for each chunk of the wave. Chunks have BLOCK rows, or fewer if threads would have no work.
static void run_chunks(const Problem *p, ChunkWork *work, const void *argument, Word *scratch, long scratch_size) {
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

// first_row returns an expert's first row whose token is `token` or later. An expert's rows are sorted by token.
static long first_row(const Problem *p, long expert, long token) {
    long low = p->offsets[expert], high = p->offsets[expert + 1];
    while (low < high) {
        long middle = (low + high) / 2;
        if (p->token[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low;
}

// TokenSum is a sum over each token's experts: of states (W, depth) times the expert's updated matrix.
//   backward  1 to multiply gradients by the matrix, 0 to multiply states by its transpose
//   bias      (E, n) or null
typedef struct {
    const Element *states;
    long depth;
    Matrices matrices;
    const LowRank *low;
    int backward;
    const Element *bias;
} TokenSum;

// operand_columns_from returns a right operand from column `first` on.
static Operand operand_columns_from(Operand right, long first) {
    right.data += first * (right.across ? 1 : right.stride);
    return right;
}

// add_to_tokens adds the wave's rows to tokens [first_token, last_token) and columns [first, first + count) of
// sums (T, n), expert after expert.
static void add_to_tokens(
    const Problem *p, const TokenSum *token_sum, long n, long first, long count, long first_token, long last_token,
    Word *scratch, float *sums
) {
    for (long expert = p->begin; expert < p->end; expert++) {
        long row = first_row(p, expert, first_token), rows = first_row(p, expert, last_token) - row;
        Operand states = rows_operand(token_sum->states + (row - p->first) * token_sum->depth, 0, token_sum->depth, 0);
        Operand lines = operand_columns_from(matrix_operand(token_sum->matrices, expert, token_sum->backward), first);
        const Element *bias = token_sum->bias ? bias_of(p, token_sum->bias, expert, n) + first : 0;
        Target target = {sums + first, 0, n, bias, p->factor + row, p->token + row, 1};
        matmul_rows(p, expert, states, lines, rows, count, token_sum->depth, scratch, target);
        const LowRank *low = token_sum->low;
        if (!low->rank) continue;
        Matrices factors = token_sum->backward ? low->a : low->b;
        lines = operand_columns_from(matrix_operand(factors, expert, token_sum->backward), first);
        target.bias = 0;
        add_from_rank(p, low, token_sum->backward, expert, row, rows, lines, count, scratch, target);
    }
}

// sum_over_experts adds the wave's rows to sums (T, n). Each thread takes some columns of some tokens, so that no two
// threads add to the same number.
static void sum_over_experts(
    const Problem *p, const TokenSum *token_sum, long n, Word *scratch, long scratch_size, float *sums
) {
    long pieces = p->threads, groups = max(1, min(pieces, n / 128)), ranges = up_to(pieces, groups) / groups;
    long size = up_to(up_to(n, groups) / groups, LANES);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(p->threads)
    for (long range = 0; range < ranges; range++)
        for (long first = 0; first < n; first += size) {
            long first_token = p->tokens * range / ranges, last_token = p->tokens * (range + 1) / ranges;
            Word *thread_scratch = scratch + omp_get_thread_num() * scratch_size;
            add_to_tokens(p, token_sum, n, first, min(size, n - first), first_token, last_token, thread_scratch, sums);
        }
}

// ForwardTargets is what forward_chunk writes.
//   h  (A, C), or null if h is not kept
//   a  (W, I) scratch: activation(h) * factor
typedef struct {
    Element *h, *a;
} ForwardTargets;

// forward_chunk computes h, a and the down update's states of one chunk.
static void forward_chunk(const Problem *p, const void *to, long expert, long row, long rows, Word *scratch) {
    const ForwardTargets *activations = to;
    long columns = p->columns, width = p->width;
    Element *h = activations->h ? activations->h + row * columns : chunk_h(p, scratch);
    Element *a = activations->a + (row - p->first) * width;
    project_up(p, expert, row, rows, scratch, h);
    for (long i = 0; i < rows; i++)
        activation_forward(p->activation, h + i * columns, width, p->factor[row + i], a + i * width);
    if (p->down_update.rank)
        project_to_rank(p, &p->down_update, 0, expert, rows_operand(a, 0, width, 0), row, rows, width, scratch);
}

// experts_forward computes the experts.
//   scratch  (threads, scratch_size), with scratch_size >= scratch_words(p)
//   h        (A, C), or null if it is not kept
//   a        (W, I) scratch
//   output   (T, H), filled with 0
void experts_forward(const Problem *p, Word *scratch, long scratch_size, Element *h, Element *a, float *output) {
    ForwardTargets activations = {h, a};
    TokenSum outputs = {a, p->width, p->down, &p->down_update, 0, p->down_bias};
    for (Problem wave = *p; next_wave(&wave);) {
        run_chunks(&wave, forward_chunk, &activations, scratch, scratch_size);
        sum_over_experts(&wave, &outputs, p->hidden, scratch, scratch_size, output);
    }
}

// Gradients is what backward reads and writes. A gradient that is not needed is null.
//   grad            (T, H) the gradient of the output
//   h               (A, C), or null to compute it again
//   grad_h          (W, C) scratch
//   a               (W, I) scratch
//   slope           (A,) the gradient of each row's factor
//   grad_x          (T, H), filled with 0
//   grad_up         (E, C, H)
//   grad_down       (E, H, I)
//   grad_up_bias    (E, C)
//   grad_down_bias  (E, H)
//   up_a, up_b, down_a, down_b  the gradients of the low-rank factors
typedef struct {
    const Element *grad, *h;
    Element *grad_h, *a;
    float *slope, *grad_x;
    Matrices grad_up, grad_down;
    Element *grad_up_bias, *grad_down_bias;
    Matrices up_a, up_b, down_a, down_b;
} Gradients;

// dot returns the dot product of two vectors (size,).
static float dot(const Element *left, const Element *right, long size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; i++) sum += to_float(left[i]) * to_float(right[i]);
    return sum;
}

// bias_gradient computes to (size,): the sum of one expert's lines (rows, size), each times factor[row] if given.
static void bias_gradient(Operand lines, const float *factor, long rows, long size, Element *to) {
    for (long start = 0; start < size; start += BLOCK) {
        long count = min(BLOCK, size - start);
        float sums[BLOCK] = {0};
        for (long row = 0; row < rows; row++) {
            const Element *line = line_of(lines, row) + start;
            float scale = factor ? factor[row] : 1;
            for (long i = 0; i < count; i++) sums[i] += scale * to_float(line[i]);
        }
        for (long i = 0; i < count; i++) to[start + i] = from_float(sums[i]);
    }
}

// backward_chunk computes a, grad_h, slope and the low-rank states that gradients need, of one chunk.
static void backward_chunk(const Problem *p, const void *to, long expert, long row, long rows, Word *scratch) {
    const Gradients *g = to;
    long hidden = p->hidden, columns = p->columns, width = p->width;
    const int32_t *token = p->token + row;
    Element *chunk_a = g->a + (row - p->first) * width, *chunk_grad_h = g->grad_h + (row - p->first) * columns;
    float *grad_a = chunk_grad_a(p, scratch);  // dO W2, without the combine weight
    const Element *h = g->h ? g->h + row * columns : chunk_h(p, scratch);
    const LowRank *up = &p->up_update, *down = &p->down_update;
    Operand grad = rows_operand(g->grad, token, hidden, 0);
    Target target = {.floats = grad_a, .stride = width};
    matmul_rows(p, expert, grad, matrix_operand(p->down, expert, 1), rows, width, hidden, scratch, target);
    if (down->rank) {
        project_to_rank(p, down, 1, expert, grad, row, rows, hidden, scratch);
        target.add = 1;
        add_from_rank(p, down, 1, expert, row, rows, matrix_operand(down->a, expert, 1), width, scratch, target);
    }
    if (!g->h) project_up(p, expert, row, rows, scratch, chunk_h(p, scratch));
    else if (g->up_b.data)
        project_to_rank(p, up, 0, expert, rows_operand(p->x, token, hidden, 0), row, rows, hidden, scratch);
    for (long i = 0; i < rows; i++) {
        Element *a = chunk_a + i * width, *grad_h = chunk_grad_h + i * columns;
        float slope = activation_backward(
            p->activation, h + i * columns, grad_a + i * width, width, p->factor[row + i], a, grad_h
        );
        if (!g->slope) continue;
        if (p->down_bias) slope += dot(line_of(grad, i), bias_of(p, p->down_bias, expert, hidden), hidden);
        g->slope[row + i] = slope;
    }
    if (up->rank)
        project_to_rank(p, up, 1, expert, rows_operand(chunk_grad_h, 0, columns, 0), row, rows, columns, scratch);
    if (g->down_b.data)
        project_to_rank(p, down, 0, expert, rows_operand(chunk_a, 0, width, 0), row, rows, width, scratch);
}

// matrix_gradient computes one expert's matrix of `to` (E, n, m): left (rows, n)ᵀ right (rows, m), in tasks of BLOCK
// lines. Both operands run across; `to` may be transposed in memory.
static void matrix_gradient(
    Matrices to, long expert, Operand left, long n, Operand right, long m, long rows, Word *scratch, long scratch_size
) {
    if (!to.data) return;
    Operand first = to.transposed ? right : left, second = to.transposed ? left : right;
    long lines = to.transposed ? m : n, length = to.transposed ? n : m;
    for (long start = 0; start < lines; start += BLOCK) {
        Operand part = first;
        part.data += start;
        Target target = {.element = to.data + expert * to.expert + start * to.stride, .stride = to.stride};
#pragma omp task firstprivate(part, second, target, start)
        {
            Word *thread_scratch = scratch + omp_get_thread_num() * scratch_size;
            matmul(part, second, min(BLOCK, lines - start), length, rows, thread_scratch, target);
        }
    }
}

// low_rank_gradients computes one expert's gradients of a (R, m) and b (n, R).
//   grad    (rows, n) the gradient of the update's output
//   states  (rows, m) the input of the update
static void low_rank_gradients(
    const Problem *p, const LowRank *low, Matrices a, Matrices b, long expert, Operand grad, long n, Operand states,
    long m, Word *scratch, long scratch_size
) {
    if (!low->rank) return;
    long row = p->offsets[expert], rows = p->offsets[expert + 1] - row, rank = low->rank;
    Operand rank_states = rows_operand(low->states + (row - p->first) * rank, 0, rank, 1);
    Operand grad_rank_states = rows_operand(low->grad_states + (row - p->first) * rank, 0, rank, 1);
    matrix_gradient(a, expert, grad_rank_states, rank, states, m, rows, scratch, scratch_size);
    matrix_gradient(b, expert, grad, n, rank_states, rank, rows, scratch, scratch_size);
}

// parameter_gradients computes the gradients of the matrices, biases and factors of the wave's experts.
static void parameter_gradients(const Problem *p, const Gradients *g, Word *scratch, long scratch_size) {
    long hidden = p->hidden, columns = p->columns, width = p->width;
#pragma omp parallel num_threads(p->threads)
#pragma omp single
    for (long expert = p->begin; expert < p->end; expert++) {
        long row = p->offsets[expert], rows = p->offsets[expert + 1] - row, place = row - p->first;
        Operand grad_h = rows_operand(g->grad_h + place * columns, 0, columns, 1);
        Operand a = rows_operand(g->a + place * width, 0, width, 1);
        Operand grad = rows_operand(g->grad, p->token + row, hidden, 1);
        Operand x = rows_operand(p->x, p->token + row, hidden, 1);
        matrix_gradient(g->grad_up, expert, grad_h, columns, x, hidden, rows, scratch, scratch_size);
        matrix_gradient(g->grad_down, expert, grad, hidden, a, width, rows, scratch, scratch_size);
        const LowRank *up = &p->up_update, *down = &p->down_update;
        low_rank_gradients(p, up, g->up_a, g->up_b, expert, grad_h, columns, x, hidden, scratch, scratch_size);
        low_rank_gradients(p, down, g->down_a, g->down_b, expert, grad, hidden, a, width, scratch, scratch_size);
        if (g->grad_up_bias) bias_gradient(grad_h, 0, rows, columns, g->grad_up_bias + expert * columns);
        if (g->grad_down_bias) bias_gradient(grad, p->factor + row, rows, hidden, g->grad_down_bias + expert * hidden);
    }
}

// experts_backward computes the gradients.
//   scratch  (threads, scratch_size), with scratch_size >= scratch_words(p)
void experts_backward(const Problem *p, Word *scratch, long scratch_size, const Gradients *g) {
    TokenSum grad_states = {g->grad_h, p->columns, p->up, &p->up_update, 1, 0};
    for (Problem wave = *p; next_wave(&wave);) {
        run_chunks(&wave, backward_chunk, g, scratch, scratch_size);
        parameter_gradients(&wave, g, scratch, scratch_size);
        if (g->grad_x) sum_over_experts(&wave, &grad_states, p->hidden, scratch, scratch_size, g->grad_x);
    }
}

// ---- single products, of which a module of half experts is made ----

// project_chunk computes h of one chunk and nothing else.
static void project_chunk(const Problem *p, const void *to, long expert, long row, long rows, Word *scratch) {
    Element *h = *(Element *const *)to;
    project_up(p, expert, row, rows, scratch, h + row * p->columns);
}

// experts_project computes h (A, C): the line token[row] of x times the matrix of the row's expert.
//   scratch  (threads, scratch_size), with scratch_size >= scratch_words(p)
void experts_project(const Problem *p, Word *scratch, long scratch_size, Element *h) {
    for (Problem wave = *p; next_wave(&wave);) run_chunks(&wave, project_chunk, &h, scratch, scratch_size);
}

// Outer is a sum over each expert's rows: left (rows, n)ᵀ right (rows, m), into `to` (E, n, m).
//   left_index, right_index  the line of each row, or null for lines in expert order
typedef struct {
    const Element *left, *right;
    const int32_t *left_index, *right_index;
    long n, m;
    Matrices to;
} Outer;

// side_of returns one side of a sum over the rows from `row` on.
static Operand side_of(const Element *data, const int32_t *index, long row, long size) {
    return index ? rows_operand(data, index + row, size, 1) : rows_operand(data + row * size, 0, size, 1);
}

// experts_outer computes the sum of each expert, 0 for an idle one.
//   scratch  (threads, scratch_size), with scratch_size >= scratch_words(p)
void experts_outer(const Problem *p, Word *scratch, long scratch_size, const Outer *o) {
#pragma omp parallel num_threads(p->threads)
#pragma omp single
    for (long expert = 0; expert < p->experts; expert++) {
        long row = p->offsets[expert], rows = p->offsets[expert + 1] - row;
        Operand left = side_of(o->left, o->left_index, row, o->n), right = side_of(o->right, o->right_index, row, o->m);
        matrix_gradient(o->to, expert, left, o->n, right, o->m, rows, scratch, scratch_size);
    }
}

// ---- decoding: a few tokens, without sorting on the caller's side and without h ----

// DecodeRows holds the rows of a few tokens in expert order. DECODE_ASSIGNMENTS is defined by compiling.py.
//   count       the number of rows
//   experts     the number of chosen experts
//   id          the expert of each row
//   assignment  the assignment of each row
//   start       the first row of each chosen expert, then `count`
typedef struct {
    long count, experts;
    long id[DECODE_ASSIGNMENTS], assignment[DECODE_ASSIGNMENTS], start[DECODE_ASSIGNMENTS + 1];
    int32_t token[DECODE_ASSIGNMENTS];
    float factor[DECODE_ASSIGNMENTS];
} DecodeRows;

// sort_assignments sorts the assignments by expert and leaves out empty ones.
//   index   (T, K) expert ids; an id outside [0, E) marks an empty assignment
//   weight  (T, K) combine weights
static DecodeRows sort_assignments(const Problem *p, const int64_t *index, const float *weight) {
    DecodeRows r = {0};
    for (long assignment = 0; assignment < p->tokens * p->top_k; assignment++) {
        if (index[assignment] < 0 || index[assignment] >= p->experts) continue;
        long row = r.count++;
        for (; row > 0 && r.id[row - 1] > index[assignment]; row--)
            r.id[row] = r.id[row - 1], r.assignment[row] = r.assignment[row - 1];
        r.id[row] = index[assignment], r.assignment[row] = assignment;
    }
    for (long row = 0; row < r.count; row++) {
        r.token[row] = r.assignment[row] / p->top_k, r.factor[row] = weight[r.assignment[row]];
        if (!row || r.id[row] != r.id[row - 1]) r.start[r.experts++] = row;
    }
    r.start[r.experts] = r.count;
    return r;
}

// experts_decode_into adds the experts of a few tokens to sums (T, H).
//   index    (T, K) expert ids, at most DECODE_ASSIGNMENTS of them
//   weight   (T, K) combine weights
//   scratch  A * (C + I) floats
// The matrices must not be transposed.
void experts_decode_into(const Problem *p, const int64_t *index, const float *weight, float *scratch, float *sums) {
    DecodeRows r = sort_assignments(p, index, weight);
    long columns = p->columns, hidden = p->hidden, blocks = up_to(columns, LANES) / LANES;
    Element *h = (Element *)scratch, *a = h + r.count * columns;
#pragma omp parallel for num_threads(p->threads)
    for (long task = 0; task < r.experts * blocks; task++) {
        long row = r.start[task / blocks], rows = r.start[task / blocks + 1] - row, first = task % blocks * LANES;
        Target target = {.element = h, .stride = columns, .bias = bias_of(p, p->up_bias, r.id[row], columns)};
        Operand states = rows_operand(p->x, r.token, hidden, 0), lines = matrix_operand(p->up, r.id[row], 0);
        multiply_few_rows(states, row, rows, lines, first, min(LANES, columns - first), hidden, target);
    }
    for (long row = 0; row < r.count; row++)
        activation_forward(p->activation, h + row * columns, p->width, r.factor[row], a + row * p->width);
#pragma omp parallel for num_threads(p->threads)
    for (long first = 0; first < hidden; first += LANES)
        for (long chosen = 0; chosen < r.experts; chosen++) {
            long row = r.start[chosen], rows = r.start[chosen + 1] - row;
            const Element *bias = bias_of(p, p->down_bias, r.id[row], hidden);
            Target target = {sums, 0, hidden, bias, r.factor, r.token, 1};
            Operand states = rows_operand(a, 0, p->width, 0), lines = matrix_operand(p->down, r.id[row], 0);
            multiply_few_rows(states, row, rows, lines, first, min(LANES, hidden - first), p->width, target);
        }
}

// experts_decode computes the experts of a few tokens as experts_decode_into does.
//   scratch  T * H + A * (C + I) floats
//   output   (T, H)
void experts_decode(const Problem *p, const int64_t *index, const float *weight, float *scratch, Element *output) {
    long size = p->tokens * p->hidden;
    float *sums = memset(scratch, 0, size * sizeof(float));
    experts_decode_into(p, index, weight, scratch + size, sums);
    for (long i = 0; i < size; i++) output[i] = from_float(sums[i]);
}

// ---- what structures.py compares with its own description when it loads the library ----

const long structure_sizes[] = {
    sizeof(Matrices), sizeof(Activation), sizeof(LowRank), sizeof(Problem), sizeof(Gradients), sizeof(Outer)
};
const long constants[] = {
    sizeof(Element), DECODE_ASSIGNMENTS, SILU, GELU_TANH, RELU, RELU_SQUARED, CLAMPED_SWIGLU, CLAMPED_SILU
};
