// Which entries of a vector are kept: by threshold, or the k largest with ties to the lower index.
#pragma once
#include "simd.h"
#include "types.h"

namespace ISA {

// score_i = |x_i - shift_i| * scale_i; value_i = x_i - shift_i.
static inline void score_entries(const Select& s, const float* x, int64_t n, float* value, float* score) {
    for (int64_t i = 0; i < n; i++) {
        const float v = s.shift ? x[i] - s.shift[i] : x[i];
        value[i] = v;
        score[i] = (s.scale ? s.scale[i] : 1.0f) * __builtin_fabsf(v);
    }
}

// Bits of a score as an unsigned number in the scores' order; NaN above infinity.
static inline uint32_t rank_key(float score) { return float_bits(score) & 0x7fffffffu; }

// The k-th largest key of n, and how many entries equal to it are still wanted. counts: 2048 + n words of scratch.
static inline uint32_t kth_key(const float* score, int64_t n, int64_t k, uint32_t* counts, int64_t* ties) {
    uint32_t* found = counts + 2048;
    __builtin_memset(counts, 0, 2048 * sizeof(uint32_t));
    uint32_t highest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t key = rank_key(score[i]);
        highest = key > highest ? key : highest;
        counts[key >> 20]++;
    }
    int64_t wanted = k;
    int bin = (int)(highest >> 20);
    while (bin > 0 && (int64_t)counts[bin] < wanted) wanted -= counts[bin--];
    int64_t m = 0;  // those in the bin that holds the k-th; their low 20 bits decide
    for (int64_t i = 0; i < n; i++) {
        const uint32_t key = rank_key(score[i]);
        found[m] = key & 0xfffffu;
        m += (key >> 20) == (uint32_t)bin;
    }
    if (m <= 64) {  // few: each one's rank by comparing all
        for (int64_t i = 0; i < m; i++) {
            int64_t larger = 0, equal = 0;
            for (int64_t j = 0; j < m; j++) larger += found[j] > found[i], equal += found[j] == found[i];
            if (larger < wanted && wanted <= larger + equal) {
                *ties = wanted - larger;
                return ((uint32_t)bin << 20) | found[i];
            }
        }
    }
    uint32_t low = 0;
    for (int shift = 10; shift >= 0; shift -= 10) {
        __builtin_memset(counts, 0, 1024 * sizeof(uint32_t));
        for (int64_t i = 0; i < m; i++) counts[(found[i] >> shift) & 1023]++;
        int digit = 1023;
        while (digit > 0 && (int64_t)counts[digit] < wanted) wanted -= counts[digit--];
        low |= (uint32_t)digit << shift;
        int64_t left = 0;
        for (int64_t i = 0; i < m; i++) {
            const uint32_t key = found[i];
            found[left] = key;
            left += ((key >> shift) & 1023) == (uint32_t)digit;
        }
        m = left;
    }
    *ties = wanted;
    return ((uint32_t)bin << 20) | low;
}

// Indices of the entries kept, ascending; returns their number. counts: as in kth_key.
static inline int64_t keep_entries(const Select& s, const float* score, int64_t n, int32_t* kept, uint32_t* counts) {
    int64_t m = 0;
    if (!s.by_rank) {
        for (int64_t i = 0; i < n; i++) {
            kept[m] = (int32_t)i;
            m += !(score[i] <= (s.threshold_each ? s.threshold_each[i] : s.threshold));
        }
        return m;
    }
    if (s.k >= n || s.k <= 0) {
        for (int64_t i = 0; s.k > 0 && i < n; i++) kept[m++] = (int32_t)i;
        return m;
    }
    int64_t ties;
    const uint32_t border = kth_key(score, n, s.k, counts, &ties);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t key = rank_key(score[i]);
        const int64_t equal = key == border;
        kept[m] = (int32_t)i;
        m += (key > border) | (equal & (ties > 0));
        ties -= equal;
    }
    return m;
}

}  // namespace ISA
