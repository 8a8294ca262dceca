// Granular sparsity: every stripe of outputs has a rule of its own, and its weights to itself, so that what it keeps lies close
// together.
#pragma once
#include "ops.h"

namespace ISA {

// Outputs of one stripe, from what `choose_rows` left. y starts at the stripe's first output, as does bias.
static inline void add_stripe(const Weight& w, const Scratch& b, int64_t count, const float* bias, const Vectors& y, int64_t begin,
                              int64_t end) {
    const int64_t block = block_of(y.batch);
    for (int64_t from = begin; from < end; from += block) {
        const int64_t to = from + block < end ? from + block : end;
        clear(b.acc, block, y.batch, to - from);
        WITH_FORMAT(w, add_rows<F>(w, b.rows, b.factors, count, y.batch, b.acc, block, from, to, count));
        settle_all(w, b.acc, block, y.batch, to - from);
        finish_block(w, bias, y, b.acc, block, from, to);
    }
}

// This thread's lines of all stripes: visit(stripe, its first and last output here, rows kept). x: [tokens][stride].
template <class Visit>
static inline void each_stripe(const Team& team, const Stripe* stripes, int64_t count, const float* x, int64_t stride,
                               int32_t share, const float* bias, const Vectors& y, const Scratch& b, Visit visit) {
    int64_t lines = 0, place = 0;
    for (int64_t s = 0; s < count; s++) lines += stripes[s].weight.padded / unit_of(stripes[s].weight);
    const int64_t begin = team.begin(lines), end = team.end(lines);
    for (int64_t s = 0; s < count && place < end; s++) {
        const Stripe& stripe = stripes[s];
        const Weight& w = stripe.weight;
        const int64_t unit = unit_of(w), own = w.padded / unit, start = place;
        place += own;
        if (place <= begin) continue;
        const int64_t from = begin > start ? (begin - start) * unit : 0, to = end < place ? (end - start) * unit : w.padded;
        int64_t kept;
        const int64_t rows = choose_rows(stripe.select, x, stride, w.rows, y.batch, share, b, &kept);
        Vectors part = y;
        part.data = (char*)y.data + stripe.first * (y.format == FORMAT_F32 ? 4 : 2);
        add_stripe(w, b, rows, bias ? bias + stripe.first : 0, part, from, to);
        visit(stripe, from, to, rows);
    }
}

// y = what each stripe's own rule keeps of x, times its weights, + bias.
static void striped(const Team& team, const Striped& a) {
    const Scratch& b = a.scratch[team.index];
    const int64_t n = a.stripes[0].weight.rows;
    for (int t = 0; t < a.x.batch; t++) read_vector(a.x, t, n, n, b.x + t * n);
    int64_t total = 0;
    each_stripe(team, a.stripes, a.count, b.x, n, a.share, a.bias, a.y, b, [&](const Stripe& s, int64_t from, int64_t to, int64_t rows) {
        const int64_t real = (to < s.weight.cols ? to : s.weight.cols) - from;
        total += real > 0 ? rows * real : 0;
    });
    if (a.read) __atomic_fetch_add(a.read, total, __ATOMIC_RELAXED);
}

}  // namespace ISA
