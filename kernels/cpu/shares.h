// Products with inputs skipped: the order of their sums, and kept rows divided among the threads.
//
// A thread that reads whole rows comes closer to the memory's speed than one that reads a piece of every row. The rows are
// divided into parts by their numbers, each with sums of its own, and those are added up in order: neither the threads
// nor the other tokens of a batch change the result.
#pragma once
#include "linear.h"
#include "parallel.h"

namespace ISA {

// Where the parts begin in the list of kept rows, and which parts are a thread's: about as many kept rows as the others'.
struct Shares {
    int64_t begin[SHARES + 1];
    int first, last;
    int64_t known;  // the end of this thread's rows
};

// rows: the `count` kept ones, ascending.
static inline Shares shares_of(const Team& team, const Weight& w, const int32_t* rows, int64_t count) {
    const int64_t n = w.rows;
    const int shares = shares_in(w);
    Shares found;
    int64_t place = 0;
    for (int p = 0; p < shares; p++) {
        int64_t low = place, high = count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (rows[middle] < n * p / shares) low = middle + 1; else high = middle;
        }
        found.begin[p] = place = low;
    }
    found.begin[shares] = count;
    int edges[2];
    for (int side = 0; side < 2; side++) {  // the border next to an equal division
        const int64_t wanted = count * (team.index + side) / team.size;
        int p = 0;
        while (p < shares && found.begin[p + 1] <= wanted) p++;
        if (p < shares && wanted - found.begin[p] > found.begin[p + 1] - wanted) p++;
        edges[side] = team.index + side == 0 ? 0 : team.index + side == team.size ? shares : p;
    }
    found.first = edges[0], found.last = edges[1];
    found.known = found.begin[found.last];
    return found;
}

static inline float* sums_of(const Weight& w, float* partial, int tokens, int p) { return partial + p * tokens * w.padded; }

// Sums in the order of their outputs again.
static inline void settle_all(const Weight& w, float* acc, int64_t stride, int tokens, int64_t width) {
    for (int t = 0; t < tokens; t++) { WITH_FORMAT(w, settle<F>(acc + t * stride, width)); }
}

// sums[t] += the rows, all outputs, in as many blocks as they take.
static inline void add_whole_rows(const Weight& w, const int32_t* rows, const float* x, int64_t count, int tokens, float* sums,
                                  int64_t known) {
    const int64_t block = block_of(tokens);
    for (int64_t from = 0; from < w.padded; from += block) {
        const int64_t to = from + block < w.padded ? from + block : w.padded;
        WITH_FORMAT(w, add_rows<F>(w, rows, x, count, tokens, sums + from, w.padded, from, to, known));
    }
}

// This thread's parts: [tokens][padded] sums of each.
static inline void add_parts(const Team& team, const Weight& w, const int32_t* rows, const float* factors, int64_t count,
                             int tokens, float* partial) {
    const Shares s = shares_of(team, w, rows, count);
    for (int p = s.first; p < s.last; p++) {
        const int64_t begin = s.begin[p];
        float* sums = sums_of(w, partial, tokens, p);
        clear(sums, w.padded, tokens, w.padded);
        add_whole_rows(w, rows + begin, factors + begin * tokens, s.begin[p + 1] - begin, tokens, sums, s.known - begin);
        settle_all(w, sums, w.padded, tokens, w.padded);
    }
}

// out[o - from] of one token: the parts' sums, the scales of int8, the bias.
static inline void sum_parts(const Weight& w, const float* bias, const float* partial, int tokens, int t, int64_t from, int64_t to,
                             float* out) {
    const int64_t size = tokens * w.padded;
    const float* sums = partial + t * w.padded;
    const int shares = shares_in(w);
    int64_t o = from;
    for (; o + LANES <= to; o += LANES) {
        vf total = load(sums + o);
        for (int p = 1; p < shares; p++) total += load(sums + p * size + o);
        store(out + o - from, total);
    }
    for (; o < to; o++) {
        float total = sums[o];
        for (int p = 1; p < shares; p++) total += sums[p * size + o];
        out[o - from] = total;
    }
    for (o = from; w.format == FORMAT_I8 && o < to; o++) out[o - from] *= ((const float*)w.scales)[o];
    for (o = from; bias && o < to; o++) out[o - from] += bias[o];
}

// The same sums in the same order for outputs [from, to), at most a block, by one thread. acc: [2][tokens][stride].
static inline void add_in_order(const Weight& w, const int32_t* rows, const float* factors, int64_t count, int tokens, float* acc,
                                int64_t stride, int64_t from, int64_t to) {
    clear(acc, stride, tokens, to - from);
    const Shares s = shares_of(Team{0, 1, 0}, w, rows, count);
    float* part = acc + tokens * stride;
    for (int p = 0; p < shares_in(w); p++) {
        const int64_t begin = s.begin[p], size = s.begin[p + 1] - begin;
        if (!size) continue;
        clear(part, stride, tokens, to - from);
        WITH_FORMAT(w, add_rows<F>(w, rows + begin, factors + begin * tokens, size, tokens, part, stride, from, to, count - begin));
        for (int t = 0; t < tokens; t++)
            for (int64_t c = 0; c < to - from; c += LANES)
                store(acc + t * stride + c, load(acc + t * stride + c) + load(part + t * stride + c));
    }
    settle_all(w, acc, stride, tokens, to - from);
}

}  // namespace ISA
