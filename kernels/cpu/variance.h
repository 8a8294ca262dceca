// What gives kept entries the variance of all: they are multiplied by sqrt(Var(z) / Var(kept z)), dropped ones counting as 0.
//
// Sums are taken in double, where the square of a float is exact, so that nothing hangs on whether a processor multiplies
// and adds in one step. Their order is the same everywhere: entry i goes to sum i % PARTIAL, then halves are added to halves.
#pragma once
#include "simd.h"

namespace ISA {

constexpr int PARTIAL = 16;

// n times the variance of x. n > 0.
static inline double variance(const float* x, int64_t n) {
    constexpr int VECTORS = PARTIAL / (LANES / 2);
    vd sum[VECTORS], square[VECTORS];
    for (int p = 0; p < VECTORS; p++) sum[p] = square[p] = (vd){};
    for (int64_t i = 0; i < n; i += PARTIAL) {
        float last[PARTIAL] = {0};
        const float* from = x + i;
        if (n - i < PARTIAL) __builtin_memcpy(last, from, (n - i) * sizeof(float)), from = last;
        for (int p = 0; p < VECTORS; p += 2) {
            const vf v = load(from + p / 2 * LANES);
            const vd low = widen_low(v), high = widen_high(v);
            sum[p] += low, square[p] += low * low;
            sum[p + 1] += high, square[p + 1] += high * high;
        }
    }
    double sums[PARTIAL], squares[PARTIAL];
    __builtin_memcpy(sums, sum, sizeof(sums)), __builtin_memcpy(squares, square, sizeof(squares));
    for (int width = PARTIAL / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width], squares[i] += squares[i + width];
    const double found = squares[0] - sums[0] * sums[0] / (double)n;
    return found < 0 ? 0 : found;  // NaN stays
}

// 1 where the kept entries do not vary at all.
static inline float repair_factor(const float* all, const float* kept, int64_t n) {
    const double of_kept = variance(kept, n);
    return of_kept == 0 ? 1.0f : (float)__builtin_sqrt(variance(all, n) / of_kept);
}

}  // namespace ISA
