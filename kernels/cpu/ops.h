// The operators as one thread of a team sees them. Buffers come from the caller (workspace.h), sizes are checked there.
#pragma once
#include "activate.h"
#include "choose.h"
#include "linear.h"
#include "ops_args.h"
#include "parallel.h"
#include "shares.h"
#include "variance.h"

namespace ISA {

static inline void read_part(const Vectors& v, int t, int64_t at, int64_t n, float* out) {
    if (v.format == FORMAT_F32) {
        __builtin_memcpy(out, (const float*)v.data + t * v.stride + at, n * sizeof(float));
    } else {
        const uint16_t* from = (const uint16_t*)v.data + t * v.stride + at;
        for (int64_t i = 0; i < n; i++) out[i] = from_bf16(from[i]);
    }
}

static inline void read_vector(const Vectors& v, int t, int64_t n, int64_t padded, float* out) {
    read_part(v, t, 0, n, out);
    for (int64_t i = n; i < padded; i++) out[i] = 0.0f;
}

static inline void write_vector(const Vectors& v, int t, int64_t at, int64_t n, const float* from) {
    if (v.format == FORMAT_F32) {
        __builtin_memcpy((float*)v.data + t * v.stride + at, from, n * sizeof(float));
    } else {
        uint16_t* to = (uint16_t*)v.data + t * v.stride + at;
        for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
    }
}

// The same vector, zero to the end of the row, in the order in which rows of w are read.
static inline void read_arranged(const Vectors& v, int t, const Weight& w, float* out) {
    read_vector(v, t, w.cols, w.padded, out);
    WITH_FORMAT(w, arrange<F>(out, w.padded, out));
}

// What a token's kept values are multiplied by. After `keep_entries`, whose scores are overwritten.
static inline float repaired_by(const Select& s, const Scratch& b, int64_t n, int64_t count) {
    if (!s.repair) return 1.0f;
    __builtin_memset(b.score, 0, n * sizeof(float));
    for (int64_t i = 0; i < count; i++) b.score[b.rows[i]] = b.value[b.rows[i]];
    return repair_factor(b.value, b.score, n);
}

// Rows that any token keeps, ascending, and x[n][t]: a token's value there, or 0 where it dropped that row itself
// (SHARE_OWN, the only one that can be repaired). x: [tokens][n] at `stride`. Returns the number of rows; *kept adds up what each token kept.
static inline int64_t choose_rows(const Select& s, const float* x, int64_t stride, int64_t n, int tokens, int32_t share,
                                  const Scratch& b, int64_t* kept) {
    if (tokens == 1) {
        if (const int64_t count = keep_at_once(s, x, n, b.rows, b.factors, b.keys); count >= 0) return *kept = count;
        score_entries(s, x, n, b.value, b.score);
        const int64_t count = keep_entries(s, b.score, n, b.rows, b.keys);
        const float repair = repaired_by(s, b, n, count);
        for (int64_t i = 0; i < count; i++) b.factors[i] = b.value[b.rows[i]] * repair;
        *kept = count;
        return count;
    }
    __builtin_memset(b.marks, 0, n * sizeof(uint16_t));
    float repair[MAX_BATCH];
    *kept = 0;
    for (int t = 0; t < tokens; t++) {
        score_entries(s, x + t * stride, n, b.value, b.score);
        const int64_t count = keep_entries(s, b.score, n, b.rows, b.keys);
        for (int64_t i = 0; i < count; i++) b.marks[b.rows[i]] |= (uint16_t)(1u << t);
        repair[t] = repaired_by(s, b, n, count);
        *kept += count;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!b.marks[i]) continue;
        const float shift = s.shift ? s.shift[i] : 0.0f;
        for (int t = 0; t < tokens; t++) {
            const bool own = share == SHARE_UNION || ((b.marks[i] >> t) & 1);
            b.factors[count * tokens + t] = own ? (x[t * stride + i] - shift) * repair[t] : 0.0f;
        }
        b.rows[count++] = (int32_t)i;
    }
    return count;
}

// One block of outputs of add_rows, with scales and bias, into y.
static inline void finish_block(const Weight& w, const float* bias, const Vectors& y, float* acc, int64_t acc_stride,
                                int64_t from, int64_t to) {
    const int64_t last = to < w.cols ? to : w.cols;
    for (int t = 0; t < y.batch; t++) {
        float* own = acc + t * acc_stride;
        if (w.format == FORMAT_I8)
            for (int64_t o = from; o < last; o++) own[o - from] *= ((const float*)w.scales)[o];
        if (bias)
            for (int64_t o = from; o < last; o++) own[o - from] += bias[o];
        if (last > from) write_vector(y, t, from, last - from, own);
    }
}

static inline void columns(const Weight& w, const int32_t* rows, const float* factors, int64_t count, const float* bias,
                           const Vectors& y, float* acc, int64_t begin, int64_t end) {
    const int64_t block = block_of(y.batch);
    for (int64_t from = begin; from < end; from += block) {
        const int64_t to = from + block < end ? from + block : end;
        add_in_order(w, rows, factors, count, y.batch, acc, block, from, to);
        finish_block(w, bias, y, acc, block, from, to);
    }
}

// Entries of a line.
static inline int64_t unit_of(const Weight& w) {
    const int64_t units[] = {F32::unit, BF16::unit, I8::unit, I4<32>::unit};
    return units[w.format];
}

// This thread's outputs, in whole lines.
static inline void split(const Team& team, const Weight& w, int64_t* begin, int64_t* end) {
    const int64_t unit = unit_of(w);
    *begin = team.begin(w.padded / unit) * unit;
    *end = team.end(w.padded / unit) * unit;
}

// This thread's outputs of a product whose rows were divided, into y. acc: [outputs of a thread].
static inline void finish_parts(const Team& team, const Weight& w, const float* bias, const Vectors& y, const float* partial,
                                 float* acc) {
    int64_t from, to;
    split(team, w, &from, &to);
    to = to < w.cols ? to : w.cols;
    for (int t = 0; t < y.batch && from < to; t++) {
        sum_parts(w, bias, partial, y.batch, t, from, to, acc);
        write_vector(y, t, from, to - from, acc);
    }
}

// y = W^T (kept entries of x) + bias, W [inputs, outputs].
static void input_sparse(const Team& team, const InputSparse& a) {
    const Weight& w = *a.weight;
    const Scratch& b = a.scratch[team.index];
    const int64_t n = w.rows;
    for (int t = 0; t < a.x.batch; t++) read_vector(a.x, t, n, n, b.x + t * n);
    int64_t kept;
    const int64_t count = choose_rows(*a.select, b.x, n, n, a.x.batch, a.share, b, &kept);
    if (a.read && team.index == 0) *a.read = count * w.cols;
    if (by_rows(w, a.x.batch, team.size)) {
        add_parts(team, w, b.rows, b.factors, count, a.x.batch, a.partial);
        team.wait();
        finish_parts(team, w, a.bias, a.y, a.partial, b.acc);
        return;
    }
    int64_t begin, end;
    split(team, w, &begin, &end);
    columns(w, b.rows, b.factors, count, a.bias, a.y, b.acc, begin, end);
}

// y = W x + bias, W [outputs, inputs], nothing skipped.
static void dense(const Team& team, const Dense& a) {
    const Weight& w = *a.weight;
    const Scratch& b = a.scratch[team.index];
    for (int t = 0; t < a.x.batch; t++) read_arranged(a.x, t, w, b.x + t * w.padded);
    float found[MAX_BATCH];
    for (int64_t row = team.begin(w.rows); row < team.end(w.rows); row++) {
        WITH_FORMAT(w, dot_row<F>(w, row, b.x, w.padded, a.x.batch, found, look_ahead<F>(w, 0, 0, row, w.rows)));
        for (int t = 0; t < a.x.batch; t++) {
            if (a.bias) found[t] += a.bias[row];
            write_vector(a.y, t, row, 1, found + t);
        }
    }
}

// b.x: arranged. h[n][t] = g_t u_t of the n-th neuron kept, for n from `begin` to `end`; `known` neurons are in the list, to fetch ahead.
static inline void products(const SparseGlu& a, const Scratch& b, int64_t begin, int64_t end, int64_t known) {
    const int tokens = a.x.batch;
    float found[MAX_BATCH];
    for (int64_t n = begin; n < end; n++) {
        const int64_t j = b.rows[n];
        WITH_FORMAT(*a.up, dot_row<F>(*a.up, j, b.x, a.up->padded, tokens, found, look_ahead<F>(*a.up, b.rows, 0, n, known)));
        for (int t = 0; t < tokens; t++) {  // not 0 times what may be infinite
            const bool own = tokens == 1 || a.share == SHARE_UNION || ((b.marks[j] >> t) & 1);
            a.h[n * tokens + t] = own ? b.factors[n * tokens + t] * (found[t] + (a.up_bias ? a.up_bias[j] : 0.0f)) : 0.0f;
        }
    }
}

// Some neurons at a time, up and down: where their rows lie side by side (Weight.stride) they are read as one.
constexpr int64_t TURN = 2 * PASS;

static inline void products_and_parts(const Team& team, const SparseGlu& a, const Scratch& b, int64_t count) {
    const Weight& w = *a.down;
    const int tokens = a.x.batch;
    const Shares s = shares_of(team, w, b.rows, count);
    for (int p = s.first; p < s.last; p++) {
        float* sums = sums_of(w, a.partial, tokens, p);
        clear(sums, w.padded, tokens, w.padded);
        for (int64_t n = s.begin[p]; n < s.begin[p + 1]; n += TURN) {
            const int64_t stop = n + TURN < s.begin[p + 1] ? n + TURN : s.begin[p + 1];
            products(a, b, n, stop, s.known);
            add_whole_rows(w, b.rows + n, a.h + n * tokens, stop - n, tokens, sums, s.known - n);
        }
        settle_all(w, sums, w.padded, tokens, w.padded);
    }
}

// This thread's share of g [tokens][neurons]: act(W_gate x), or what was given.
static inline void fill_gates(const Team& team, const SparseGlu& a, const Scratch& b) {
    const int tokens = a.x.batch;
    const int64_t neurons = a.up->rows, first = team.begin(neurons), last = team.end(neurons);
    if (!a.gate) {
        for (int t = 0; t < tokens; t++) read_part(a.given, t, first, last - first, a.g + t * neurons + first);
        return;
    }
    float found[MAX_BATCH];
    for (int64_t j = first; j < last; j++) {
        WITH_FORMAT(*a.gate, dot_row<F>(*a.gate, j, b.x, a.gate->padded, tokens, found, look_ahead<F>(*a.gate, 0, 0, j, last)));
        for (int t = 0; t < tokens; t++) a.g[t * neurons + j] = found[t] + (a.gate_bias ? a.gate_bias[j] : 0.0f);
    }
    for (int t = 0; t < tokens; t++) activate(a.g + t * neurons + first, last - first, a.activation);
}

// y = W_down^T (g * (W_up x)) over the neurons kept, g = act(W_gate x), kept by the rule on g. In one call.
static void sparse_glu(const Team& team, const SparseGlu& a) {
    const Scratch& b = a.scratch[team.index];
    const int tokens = a.x.batch;
    const int64_t neurons = a.up->rows;
    for (int t = 0; t < tokens; t++) read_arranged(a.x, t, *a.up, b.x + t * a.up->padded);
    fill_gates(team, a, b);
    team.wait();
    int64_t kept;
    const int64_t count = choose_rows(a.select, a.g, neurons, neurons, tokens, a.share, b, &kept);
    if (a.kept && team.index == 0) *a.kept = count;
    if (by_rows(*a.down, tokens, team.size)) {
        products_and_parts(team, a, b, count);
        team.wait();
        finish_parts(team, *a.down, a.down_bias, a.y, a.partial, b.acc);
        return;
    }
    products(a, b, team.begin(count), team.end(count), team.end(count));
    team.wait();
    int64_t from, to;
    split(team, *a.down, &from, &to);
    columns(*a.down, b.rows, a.h, count, a.down_bias, a.y, b.acc, from, to);
}

}  // namespace ISA
