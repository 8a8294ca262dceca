// Which entries of a vector are kept: by threshold, or the k largest, of all or of each group, with ties to the lower index.
#pragma once
#include "groups.h"
#include "ops_args.h"

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

// A key that exactly k of n keys exceed or, where there is none, the k-th largest: then `ties` of those equal to it belong
// to the k as well. By halving the range of keys, which asks only for counts: they vectorise. 0 < k < n.
// keys: scratch of n + KEYS_MORE words.
static inline uint32_t border_key(const float* score, int64_t n, int64_t k, uint32_t* keys, int64_t* ties) {
    for (int64_t i = 0; i < n; i++) keys[i] = rank_key(score[i]);
    for (int64_t i = n; i < n + KEYS_MORE; i++) keys[i] = 0;
    uint32_t found = 0;  // at least k keys are not below it
    for (int bit = 30; bit >= 0; bit--) {
        const uint32_t higher = found | (1u << bit);
        const int64_t count = count_from(keys, n, higher);
        if (count == k) {
            *ties = 0;
            return higher - 1;
        }
        if (count > k) found = higher;
    }
    *ties = k - (found == 0x7fffffffu ? 0 : count_from(keys, n, found + 1));
    return found;
}

#if ISA_LEVEL == 2
static inline int64_t append(int32_t* kept, int64_t m, int64_t first, __mmask16 mask) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)first));
    _mm512_storeu_si512(kept + m, _mm512_maskz_compress_epi32(mask, index));  // up to 16 beyond: there is room
    return m + __builtin_popcount(mask);
}
#endif

static inline int64_t keep_by_threshold(const Select& s, const float* score, int64_t n, int32_t* kept) {
    int64_t m = 0, i = 0;
#if ISA_LEVEL == 2
    for (; i + 16 <= n; i += 16) {
        const __m512 border = s.threshold_each ? _mm512_loadu_ps(s.threshold_each + i) : _mm512_set1_ps(s.threshold);
        m = append(kept, m, i, _mm512_cmp_ps_mask(_mm512_loadu_ps(score + i), border, _CMP_NLE_UQ));
    }
#endif
    for (; i < n; i++) {
        kept[m] = (int32_t)i;
        m += !(score[i] <= (s.threshold_each ? s.threshold_each[i] : s.threshold));
    }
    return m;
}

static inline int64_t keep_by_rank(const float* score, int64_t n, int64_t k, int32_t* kept, uint32_t* keys) {
    int64_t m = 0, i = 0, ties;
    if (k <= 0 || k >= n) {
        for (; k > 0 && i < n; i++) kept[i] = (int32_t)i;
        return i;
    }
    const uint32_t border = border_key(score, n, k, keys, &ties);
#if ISA_LEVEL == 2
    const __m512i borders = _mm512_set1_epi32((int32_t)border);
    for (; ties == 0 && i + 16 <= n; i += 16)
        m = append(kept, m, i, _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + i), borders));
#endif
    for (; i < n; i++) {
        const int64_t equal = keys[i] == border;
        kept[m] = (int32_t)i;
        m += (keys[i] > border) | (equal & (ties > 0));
        ties -= equal;
    }
    return m;
}

constexpr int64_t SAMPLED = 32;  // one value of so many

// The indices of the k largest of n values, rising, with ties to the lower. Made for few of many: a sample says where about the
// k-th largest lies, and only values that are not below that are ranked; where it was misled, all are.
// score: scratch of n; keys: of n + KEYS_MORE; among, kept: of n + ROWS_MORE.
static inline void keep_largest(
    const float* x, int64_t n, int64_t k, int32_t* kept, float* score, int32_t* among, uint32_t* keys) {
    const int64_t few = n / SAMPLED, rank = 2 * k / SAMPLED + 16;
    int64_t ties, m = 0;
    float least = x[0];
    if (rank < few) {
        for (int64_t i = 1; i < few; i++) least = x[i * SAMPLED] < least ? x[i * SAMPLED] : least;
        for (int64_t i = 0; i < few; i++) score[i] = x[i * SAMPLED] - least;
        const uint32_t border = border_key(score, few, rank, keys, &ties);
        float above;
        __builtin_memcpy(&above, &border, sizeof above);
        const float floor = least + above;
        int64_t i = 0;
#if ISA_LEVEL == 2
        for (; i + 16 <= n; i += 16)
            m = append(among, m, i, _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(floor), _CMP_NLT_UQ));
#endif
        for (; i < n; i++) {
            among[m] = (int32_t)i;
            m += !(x[i] < floor);
        }
        least = floor;
    }
    if (m < k || m == n) {  // as where something is not finite
        for (m = 0; m < n; m++) among[m] = (int32_t)m;
        least = x[0];
        for (int64_t i = 1; i < n; i++) least = x[i] < least ? x[i] : least;
    }
    for (int64_t i = 0; i < m; i++) score[i] = x[among[i]] - least;
    keep_by_rank(score, m, k, kept, keys);
    for (int64_t i = 0; i < k; i++) kept[i] = among[kept[i]];
}

static inline int64_t keep_by_groups(const Select& s, const float* score, int64_t n, int32_t* kept, int32_t* keys) {
    for (int64_t i = 0; i < n; i++) keys[i] = group_key(score[i]);
    for (int64_t i = n; i < n + LANES; i++) keys[i] = 0;
    int64_t m = 0;
    for (int64_t at = 0; at < n;) {
        int size;
        uint64_t bits = keep_next(keys, at, n, (int)s.k, s.group, &size);
#if ISA_LEVEL == 2
        for (int64_t first = at; bits; first += 16, bits >>= 16) m = append(kept, m, first, (__mmask16)bits);
#else
        for (; bits; bits &= bits - 1) kept[m++] = (int32_t)(at + __builtin_ctzll(bits));
#endif
        at += size;
    }
    return m;
}

// The same with the values kept, for thresholds and in one go; -1 where the rule is another. value: room as `kept`.
static inline int64_t keep_at_once(const Select& s, const float* x, int64_t n, int32_t* kept, float* value) {
#if ISA_LEVEL == 2
    if (s.by_rank || s.repair) return -1;
    __m512 border = _mm512_set1_ps(s.threshold);
    int64_t m = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 there = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff;
        __m512 v = _mm512_maskz_loadu_ps(there, x + i);
        if (s.shift) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(there, s.shift + i));
        __m512 score = _mm512_abs_ps(v);
        if (s.scale) score = _mm512_mul_ps(score, _mm512_maskz_loadu_ps(there, s.scale + i));
        if (s.threshold_each) border = _mm512_maskz_loadu_ps(there, s.threshold_each + i);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(there, score, border, _CMP_NLE_UQ);
        _mm512_storeu_ps(value + m, _mm512_maskz_compress_ps(mask, v));  // up to 16 beyond: there is room
        m = append(kept, m, i, mask);
    }
    return m;
#else
    (void)s, (void)x, (void)n, (void)kept, (void)value;
    return -1;
#endif
}

// Indices of the entries kept, ascending; returns their number. kept: room for n + LANES. keys: for n + KEYS_MORE.
static inline int64_t keep_entries(const Select& s, const float* score, int64_t n, int32_t* kept, uint32_t* keys) {
    if (s.group) return keep_by_groups(s, score, n, kept, (int32_t*)keys);
    return s.by_rank ? keep_by_rank(score, n, s.k, kept, keys) : keep_by_threshold(s, score, n, kept);
}

}  // namespace ISA
