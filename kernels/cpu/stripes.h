// Granular sparsity: every stripe of outputs has a rule of its own, and its weights to itself, so that what it keeps lies close
// together.
#pragma once
#include "ops.h"

namespace ISA {

// Outputs of one stripe, from the rows that it keeps; the list holds `known`. y starts at the stripe's first output, as does bias.
static inline void add_stripe(const Weight& w, const Scratch& b, int64_t count, int64_t known, const float* bias, const Vectors& y,
                              int64_t begin, int64_t end) {
    const int64_t block = block_of(y.batch);
    for (int64_t from = begin; from < end; from += block) {
        const int64_t to = from + block < end ? from + block : end;
        clear(b.acc, block, y.batch, to - from);
        WITH_FORMAT(w, add_rows<F>(w, b.rows, b.factors, count, y.batch, b.acc, block, from, to, known));
        settle_all(w, b.acc, block, y.batch, to - from);
        finish_block(w, bias, y, b.acc, block, from, to);
    }
}

static inline int64_t pitch_of(const Weight& w) {
    WITH_FORMAT(w, return F::pitch(w));
}

// Puts the first rows of the next stripe behind the `count` of this one, by the numbers that they would have here: a stripe is
// so short that the memory would be asked too late for most of it else. Returns how many rows the list then holds.
static inline int64_t append_next(const Weight& w, const Weight& next, int32_t* rows, int64_t count, const int32_t* more,
                                  int64_t more_count) {
    const int64_t pitch = pitch_of(w), apart = (const char*)next.data - (const char*)w.data, offset = apart / pitch;
    if (next.format != w.format || pitch_of(next) != pitch || apart % pitch || offset < 0 || offset > INT32_MAX / 2)
        return count;
    const int64_t some = more_count < ROWS_AHEAD ? more_count : ROWS_AHEAD;
    for (int64_t i = 0; i < some; i++) rows[count + i] = (int32_t)(more[i] + offset);
    return count + some;
}

// This thread's lines of all stripes: visit(stripe, its first and last output here, rows kept). x: [tokens][stride].
template <class Visit>
static inline void each_stripe(const Team& team, const Stripe* stripes, int64_t count, const float* x, int64_t stride,
                               int32_t share, const float* bias, const Vectors& y, Scratch b, Visit visit) {
    int64_t lines = 0, place = 0, s = 0, kept;
    auto size = [&](int64_t i) { return stripes[i].weight.padded / unit_of(stripes[i].weight); };
    for (int64_t i = 0; i < count; i++) lines += size(i);
    const int64_t begin = team.begin(lines), end = team.end(lines);
    if (begin == end) return;
    while (place + size(s) <= begin) place += size(s++);
    int64_t rows = choose_rows(stripes[s].select, x, stride, stripes[s].weight.rows, y.batch, share, b, &kept);
    for (; place < end; s++) {
        const Stripe& stripe = stripes[s];
        const Weight& w = stripe.weight;
        const int64_t unit = unit_of(w), start = place;
        place += size(s);
        int64_t known = rows, next = 0;
        Scratch after = b;
        after.rows = b.next_rows, after.factors = b.next_factors, after.next_rows = b.rows, after.next_factors = b.factors;
        if (place < end) {
            next = choose_rows(stripes[s + 1].select, x, stride, w.rows, y.batch, share, after, &kept);
            known = append_next(w, stripes[s + 1].weight, b.rows, rows, after.rows, next);
        }
        const int64_t from = begin > start ? (begin - start) * unit : 0, to = end < place ? (end - start) * unit : w.padded;
        Vectors part = y;
        part.data = (char*)y.data + stripe.first * (y.format == FORMAT_F32 ? 4 : 2);
        add_stripe(w, b, rows, known, bias ? bias + stripe.first : 0, part, from, to);
        visit(stripe, from, to, rows);
        b = after, rows = next;
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
