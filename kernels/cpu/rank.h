// The border between the k largest scores and the rest: what choosing by rank comes down to.
#pragma once
#include "simd.h"

namespace ISA {

// Bits of a score as an unsigned number in the scores' order; NaN above infinity.
static inline uint32_t rank_key(float score) { return float_bits(score) & 0x7fffffffu; }

// How many of n keys (whole vectors, the rest 0) are at least `floor`, which is above 0.
static inline int64_t count_from(const uint32_t* keys, int64_t n, uint32_t floor) {
    vi counts[4] = {(vi){}, (vi){}, (vi){}, (vi){}};
    const vi least = (vi)(floor - (vu){});
    for (int64_t i = 0; i < n; i += 4 * LANES)
        for (int p = 0; p < 4; p++) counts[p] -= (vi)*(const vu_any*)(keys + i + p * LANES) >= least;
    const vi all = counts[0] + counts[1] + counts[2] + counts[3];
    int64_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += all[lane];
    return total;
}

// Scores' keys, zeros after them; returns the scores' mean, or what comes of it where one is not finite.
// keys: of n + KEYS_MORE words.
static inline float rank_keys(const float* score, int64_t n, uint32_t* keys) {
    vf sums = (vf){};
    float total = 0.0f;
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        const vf own = load(score + i);
        *(vu_any*)(keys + i) = (vu)own & 0x7fffffffu;
        sums += own;
    }
    for (int64_t i = whole; i < n; i++) {
        keys[i] = rank_key(score[i]);
        total += score[i];
    }
    for (int64_t i = n; i < n + KEYS_MORE; i++) keys[i] = 0;
    return (sum(sums) + total) / n;
}

// log2 and a constant, to within a tenth: the bits of a float are about that.
static inline float about_log2(float x) { return float_bits(x) * 0x1p-23f; }

constexpr int GUESSES = 8;  // before every second key is the middle of what is left

// A key that exactly k of n keys exceed or, where there is none, the k-th largest: then `ties` of those equal to it belong
// to the k as well. 0 < k < n.
//
// Asks only for counts, which vectorise: how many keys are not below one that lies between bounds. It is guessed, at first as
// if scores fell off exponentially from 0, then by what the bounds' counts say, which takes a third of the counts that halving
// takes; halving in between keeps their number below 80 whatever the scores are.
static inline uint32_t border_key(const uint32_t* keys, int64_t n, int64_t k, float mean, int64_t* ties) {
    constexpr uint32_t TOP = 0x80000000u;
    uint32_t low = 0, high = TOP;  // at least k keys are not below `low`, fewer not below `high`
    int64_t above_low = n, above_high = 0, count = n;
    const float wanted = about_log2((float)k), slope = 0.693f * mean;
    float guess = 0.0f;
    for (int pass = 0; high - low > 1; pass++) {
        uint32_t key = low + (high - low) / 2;
        if (pass < GUESSES || pass & 1) {
            if (low > 0 && high < TOP) {
                float from, to;
                __builtin_memcpy(&from, &low, sizeof from);
                __builtin_memcpy(&to, &high, sizeof to);
                const float most = about_log2((float)above_low), least = above_high ? about_log2((float)above_high) : about_log2(0.5f);
                guess = from + (to - from) * ((most - wanted) / (most - least));
            } else {
                guess += slope * ((count ? about_log2((float)count) : about_log2(0.5f)) - wanted);
            }
            if (guess > 0.0f) key = rank_key(guess);
            key = key <= low ? low + 1 : key >= high ? high - 1 : key;
        }
        count = count_from(keys, n, key);
        if (count == k) {
            *ties = 0;
            return key - 1;
        }
        if (count > k)
            low = key, above_low = count;
        else
            high = key, above_high = count;
    }
    *ties = k - above_high;
    return low;
}

}  // namespace ISA
