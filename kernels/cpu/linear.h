// The two ways through a matrix that leave parts of it unread, for one thread's share of the work.
//
//   add_rows   acc += sum over kept rows i of x_i W[i, :]     inputs skipped, W [inputs, outputs]
//   dot_rows   y_j = W[j, :] . x for kept rows j              outputs skipped, W [outputs, inputs]
//
// Sums run over rows (add_rows) or along a row (dot_rows) in an order that no number of threads changes.
#pragma once
#include "formats.h"
#include "int4.h"
#include "ops_args.h"

namespace ISA {

constexpr int PASS = 8;          // rows a pass: their sum is taken before the accumulator is touched
constexpr int TOKENS = 4;        // tokens a pass share the converted weights
constexpr int64_t STEP = 2048;  // bytes ahead, of each row in add_rows
constexpr int64_t FLIGHT = 8192;  // bytes on their way where rows are short and lie apart
constexpr int64_t DISTANCE = 3072;  // bytes that a row is fetched ahead of its use
constexpr int64_t PIECE = 4096;  // entries of a row whose scales are widened at once
constexpr int64_t BLOCK = 8192;  // accumulators that the first-level cache holds beside the rows

// Outputs of a block: fewer where each has an accumulator for every token.
static inline int64_t block_of(int tokens) {
    const int64_t block = BLOCK / tokens / 128 * 128;
    return block < 512 ? 512 : block;
}

// One pass: N rows, T tokens, outputs [from, to). x: one value for each row and token, [N][x_stride]. `next`: the N rows
// after these; each row is fetched STEP bytes ahead, and the first of the next one while the last of this one is used.
template <class F, int N, int T>
static inline void add_pass(const Weight& w, const int32_t* rows, const float* x, int64_t x_stride, float* acc,
                            int64_t acc_stride, int64_t from, int64_t to, const int32_t* next) {
    vf factors[N][T];  // in registers: the compiler cannot know that the accumulators do not overlap x
    for (int n = 0; n < N; n++)
        for (int t = 0; t < T; t++) factors[n][t] = splat(x[n * x_stride + t]);
    constexpr int GROUPS = F::scaled ? BLOCK / F::shared : 1;
    float scales[F::scaled ? N : 1][F::scaled ? GROUPS + LANES : 1];  // one token: times its factor already
    if (F::scaled)
        for (int n = 0; n < N; n++)
            read_scales<F>(w, rows[n], from, (to - from) / F::shared, T == 1 ? x[n * x_stride] : 1.0f, scales[n]);
    if (F::scaled && next)
        for (int n = 0; n < N; n++) fetch_scales<F>(w, next[n], from, (to - from) / F::shared);
    const char *here[N], *there[N];
    const int64_t bytes = (to - from) / F::unit * 64, step = STEP < bytes ? STEP : bytes;
    for (int n = 0; n < N; n++) {
        here[n] = (const char*)F(w, rows[n], from).line + step;
        there[n] = (const char*)F(w, next ? next[n] : rows[n], from).line + step - bytes;  // no next: what is here already
    }
    if constexpr (F::scaled && T == 1 && N % 2 == 0) {
        Whole<N, GROUPS> whole;
        if (w.rounded && to_whole(scales, (to - from) / F::shared, whole)) return add_whole<F, N, GROUPS>(here, there, whole, acc, bytes, step);
    }
    int64_t place = 0, group = 0;
    F line[N];
    for (int n = 0; n < N; n++) line[n] = F(w, rows[n], from);
    for (int64_t c = from; c < to; c += F::unit, place += 64) {
        for (int n = 0; n < N; n++) prefetch((place < bytes - step ? here[n] : there[n]) + place);
#pragma GCC unroll 8
        for (int g = 0; g < F::unit / LANES; g += F::shared / LANES, group++) {
            vf scaled[N][T];
            for (int n = 0; n < N; n++)
                for (int t = 0; t < T; t++)
                    scaled[n][t] = !F::scaled ? factors[n][t] : T == 1 ? splat(scales[n][group]) : factors[n][t] * scales[n][group];
#pragma GCC unroll 8
            for (int v = g; v < g + F::shared / LANES; v++) {
                vf values[N];
                for (int n = 0; n < N; n++) values[n] = line[n].get(v);
                for (int t = 0; t < T; t++) {
                    float* target = acc + t * acc_stride + (c - from) + v * LANES;
                    vf total = load(target);
                    for (int n = 0; n < N; n++) total += values[n] * scaled[n][t];
                    store(target, total);
                }
            }
        }
        for (int n = 0; n < N; n++) line[n].advance();
    }
}

// One token takes all N rows at once; more tokens take half of them twice, since registers hold a factor for each row and token.
template <class F, int N>
static inline void add_tokens(const Weight& w, const int32_t* rows, const float* x, int tokens, float* acc,
                              int64_t acc_stride, int64_t from, int64_t to, const int32_t* next) {
    constexpr int HALF = N / 2;
    int t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS) {
        float* sums = acc + t * acc_stride;
        add_pass<F, HALF, TOKENS>(w, rows, x + t, tokens, sums, acc_stride, from, to, rows + HALF);
        add_pass<F, HALF, TOKENS>(w, rows + HALF, x + HALF * tokens + t, tokens, sums, acc_stride, from, to, next);
    }
    for (; t < tokens; t++) add_pass<F, N, 1>(w, rows, x + t, tokens, acc + t * acc_stride, acc_stride, from, to, next);
}

static inline void clear(float* acc, int64_t acc_stride, int tokens, int64_t width) {
    for (int t = 0; t < tokens; t++)
        for (int64_t c = 0; c < width; c += LANES) store(acc + t * acc_stride + c, (vf){});
}

// acc, in the order of the format's vectors: acc[t][o - from] += sum over n < count of x[n][t] W[rows[n], o] for outputs [from, to), at most BLOCK of them.
// known: how many rows the list holds from here on, for fetching ahead.
template <class F>
static inline void add_rows(const Weight& w, const int32_t* rows, const float* x, int64_t count, int tokens, float* acc,
                            int64_t acc_stride, int64_t from, int64_t to, int64_t known) {
    const int64_t bytes = (to - from) / F::unit * 64;
    const int64_t later = bytes > STEP ? PASS : (FLIGHT / (PASS * bytes) + 1) * PASS;  // short rows: whole passes ahead
    int64_t n = 0;
    for (; n + PASS <= count; n += PASS)
        add_tokens<F, PASS>(w, rows + n, x + n * tokens, tokens, acc, acc_stride, from, to,
                            n + later + PASS <= known ? rows + n + later : 0);
    if (n == count) return;
    int32_t last[PASS];  // the rest as a whole pass too: the last row again, times 0
    float factors[PASS * MAX_BATCH] = {0};
    for (int64_t i = 0; i < PASS; i++) last[i] = rows[n + i < count ? n + i : count - 1];
    __builtin_memcpy(factors, x + n * tokens, (count - n) * tokens * sizeof(float));
    add_tokens<F, PASS>(w, last, factors, tokens, acc, acc_stride, from, to, 0);
}

// Where to fetch from while a row is read: `early` for its first bytes, `late` from `turn` on, both by the byte's own place.
struct Ahead {
    const char* early;
    const char* late;
    int64_t turn;
};

// DISTANCE bytes ahead: further along this row, then into the next one of the list; for short rows, whole rows ahead.
// rows: what will be read, `count` of them, this one at `n`; null: rows first, first + 1, ...
template <class F>
static inline Ahead look_ahead(const Weight& w, const int32_t* rows, int64_t first, int64_t n, int64_t count) {
    const int64_t bytes = row_bytes<F>(w), skip = bytes >= DISTANCE ? 1 : (rows ? FLIGHT : DISTANCE) / bytes;
    const int64_t later = n + skip < count ? n + skip : count - 1;
    const char* next = row_address<F>(w, rows ? rows[later] : first + later);
    if (bytes < DISTANCE) return {next, next, bytes};
    return {row_address<F>(w, rows ? rows[n] : first + n) + DISTANCE, next + DISTANCE - bytes, bytes - DISTANCE};
}

// T dot products of one row; x: [T][x_stride], arranged for the format, zero in the padding.
template <class F, int T>
static inline void dot_tokens(const Weight& w, int64_t row, const float* x, int64_t x_stride, float* y, const Ahead& ahead) {
    constexpr int PARTS = T == 1 ? 4 : 1;  // independent sums hide the latency of one addition
    constexpr int GROUP = F::shared / LANES;
    vf total[T][PARTS];
    for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) total[t][p] = (vf){};
    int64_t place = 0;
    float scales[F::scaled ? PIECE / F::shared : 1];
    F line(w, row, 0);
    for (int64_t piece = 0; piece < w.padded; piece += PIECE) {
        const int64_t stop = piece + PIECE < w.padded ? piece + PIECE : w.padded;
        if (F::scaled) read_scales<F>(w, row, piece, (stop - piece) / F::shared, 1.0f, scales);
        int64_t group = 0;
        for (int64_t c = piece; c < stop; c += F::unit, place += 64, line.advance()) {
            prefetch((place < ahead.turn ? ahead.early : ahead.late) + place);
#pragma GCC unroll 8
            for (int g = 0; g < F::unit / LANES; g += GROUP, group++) {
                vf values[GROUP];
                for (int v = 0; v < GROUP; v++) values[v] = line.get(g + v);
                for (int t = 0; t < T; t++) {
                    const float* from = x + t * x_stride + c + g * LANES;
                    if (F::scaled) {
                        vf part = values[0] * load(from);
                        for (int v = 1; v < GROUP; v++) part += values[v] * load(from + v * LANES);
                        total[t][g / GROUP % PARTS] += part * scales[group];
                    } else {
                        for (int v = 0; v < GROUP; v++) total[t][(g + v) % PARTS] += values[v] * load(from + v * LANES);
                    }
                }
            }
        }
    }
    for (int t = 0; t < T; t++) {
        vf all = total[t][0];
        for (int p = 1; p < PARTS; p++) all += total[t][p];
        y[t] = sum(all);
    }
}

// y[t] of one row for all tokens.
template <class F>
static inline void dot_row(const Weight& w, int64_t row, const float* x, int64_t x_stride, int tokens, float* y, const Ahead& ahead) {
    int t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS) dot_tokens<F, TOKENS>(w, row, x + t * x_stride, x_stride, y + t, ahead);
    for (; t < tokens; t++) dot_tokens<F, 1>(w, row, x + t * x_stride, x_stride, y + t, ahead);
    if (w.format == FORMAT_I8)
        for (t = 0; t < tokens; t++) y[t] *= ((const float*)w.scales)[row];
}

// y[n * tokens + t] of rows `begin` to `end` of a list (null: of all rows), for one thread.
template <class F>
static inline void dot_rows(const Weight& w, const int32_t* rows, int64_t begin, int64_t end, const float* x, int64_t x_stride,
                            int tokens, float* y) {
    for (int64_t n = begin; n < end; n++)
        dot_row<F>(w, rows ? rows[n] : n, x, x_stride, tokens, y + n * tokens, look_ahead<F>(w, rows, 0, n, end));
}

// The same code for the four formats.
#define WITH_FORMAT(weight, CALL)                       \
    switch ((weight).format) {                          \
        case FORMAT_F32: { typedef F32 F; CALL; break; }   \
        case FORMAT_BF16: { typedef BF16 F; CALL; break; } \
        case FORMAT_I8: { typedef I8 F; CALL; break; }     \
        default:                                           \
            if ((weight).group == 32) { typedef I4<32> F; CALL; } else { typedef I4<128> F; CALL; } \
    }

}  // namespace ISA
