// Which entries of a vector are kept: by threshold, or the k largest, of all or of each group, with ties to the lower index.
#pragma once
#include "groups.h"
#include "ops_args.h"
#include "rank.h"

namespace ISA {

// score_i = |x_i - shift_i| * scale_i, or with its sign; value_i = x_i - shift_i.
static inline void score_entries(const Select& s, const float* x, int64_t n, float* value, float* score) {
    for (int64_t i = 0; i < n; i++) {
        const float v = s.shift ? x[i] - s.shift[i] : x[i];
        value[i] = v;
        score[i] = (s.scale ? s.scale[i] : 1.0f) * (s.with_sign ? v : __builtin_fabsf(v));
    }
}

#if ISA_LEVEL == 2
static inline int64_t append(int32_t* kept, int64_t m, int64_t first, __mmask16 mask) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)first));
    _mm512_storeu_si512(kept + m, _mm512_maskz_compress_epi32(mask, index));  // up to 16 beyond: there is room
    return m + __builtin_popcount(mask);
}
#endif

// The threshold that a law makes of the scores' moments.
static inline float law_threshold(const Select& s, const float* score, int64_t n) {
    const auto mean_square = [&](float from) {
        vf sums = (vf){};
        float rest = 0.0f;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) sums += (load(score + i) - from) * (load(score + i) - from);
        for (; i < n; i++) rest += (score[i] - from) * (score[i] - from);
        return (sum(sums) + rest) / n;
    };
    if (s.law == LAW_HALF_NORMAL) return s.threshold * __builtin_sqrtf(mean_square(0.0f));
    vf sums = (vf){};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(score + i);
    for (; i < n; i++) rest += score[i];
    const float mean = (sum(sums) + rest) / n;
    return mean + s.threshold * __builtin_sqrtf(mean_square(mean));
}

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
    const float mean = rank_keys(score, n, keys);
    const uint32_t border = border_key(keys, n, k, mean, &ties);
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

constexpr int64_t SAMPLE = 1024;  // values, evenly spaced

// A value that about twice k of n values, or a few more, are not below: from a sample. Minus infinity where k is not few.
// score: scratch of SAMPLE floats; keys: of SAMPLE + KEYS_MORE.
static inline float likely_floor(const float* x, int64_t n, int64_t k, float* score, uint32_t* keys) {
    const int64_t step = n / SAMPLE, rank = step ? 2 * k / step + 16 : SAMPLE;
    if (rank >= SAMPLE) return -__builtin_inff();
    float least = x[0];
    for (int64_t i = 1; i < SAMPLE; i++) least = x[i * step] < least ? x[i * step] : least;
    for (int64_t i = 0; i < SAMPLE; i++) score[i] = x[i * step] - least;
    int64_t ties;
    const float mean = rank_keys(score, SAMPLE, keys);
    const uint32_t border = border_key(keys, SAMPLE, rank, mean, &ties);
    float above;
    __builtin_memcpy(&above, &border, sizeof above);
    return least + above;
}

// Indices of values from `begin` to `end` that are not below `floor`, rising. kept: of their number and ROWS_MORE.
static inline int64_t keep_from(const float* x, int64_t begin, int64_t end, float floor, int32_t* kept) {
    int64_t m = 0, i = begin;
#if ISA_LEVEL == 2
    for (; i + 16 <= end; i += 16)
        m = append(kept, m, i, _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(floor), _CMP_NLT_UQ));
#endif
    for (; i < end; i++) {
        kept[m] = (int32_t)i;
        m += !(x[i] < floor);
    }
    return m;
}

// The indices of the k largest of n values, rising, with ties to the lower, of which m >= k that are not below all others are
// in `among`, or fewer: then all are ranked. score: scratch of n; keys: of n + KEYS_MORE; among, kept: of n + ROWS_MORE.
static inline void keep_largest(
    const float* x, int64_t n, int64_t k, int64_t m, int32_t* kept, float* score, int32_t* among, uint32_t* keys) {
    if (m < k)  // the sample misled, or something is not finite
        for (m = 0; m < n; m++) among[m] = (int32_t)m;
    float least = x[among[0]];
    for (int64_t i = 1; i < m; i++) least = x[among[i]] < least ? x[among[i]] : least;
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

#if ISA_LEVEL == 2
// The first `count` of the lanes that are set.
static inline __mmask16 first_of(__mmask16 lanes, int64_t count) {
    __mmask16 found = 0;
    for (; count > 0 && lanes; count--, lanes &= lanes - 1) found |= lanes & -lanes;
    return found;
}
#endif

// The same with the values kept, in one go; -1 where the rule is another. value: room as `kept`. keys: for n + KEYS_MORE.
static inline int64_t keep_at_once(const Select& s, const float* x, int64_t n, int32_t* kept, float* value, uint32_t* keys) {
#if ISA_LEVEL == 2
    if (s.group || s.repair || s.law || s.with_sign || (s.by_rank && (s.k <= 0 || s.k >= n))) return -1;
    const auto values = [&](int64_t i, __mmask16 there) {
        const __m512 v = _mm512_maskz_loadu_ps(there, x + i);
        return s.shift ? _mm512_sub_ps(v, _mm512_maskz_loadu_ps(there, s.shift + i)) : v;
    };
    const auto scores = [&](int64_t i, __mmask16 there, __m512 v) {
        const __m512 size = _mm512_abs_ps(v);
        return s.scale ? _mm512_mul_ps(size, _mm512_maskz_loadu_ps(there, s.scale + i)) : size;
    };
    const auto lanes = [&](int64_t i) { return n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff; };
    int64_t m = 0, ties = 0;
    const auto keep = [&](int64_t i, __m512 v, __mmask16 mask) {
        _mm512_storeu_ps(value + m, _mm512_maskz_compress_ps(mask, v));  // up to 16 beyond: there is room
        m = append(kept, m, i, mask);
    };
    if (!s.by_rank) {
        __m512 border = _mm512_set1_ps(s.threshold);
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 there = lanes(i);
            const __m512 v = values(i, there);
            if (s.threshold_each) border = _mm512_maskz_loadu_ps(there, s.threshold_each + i);
            keep(i, v, _mm512_mask_cmp_ps_mask(there, scores(i, there, v), border, _CMP_NLE_UQ));
        }
        return m;
    }
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 there = lanes(i);
        const __m512 score = scores(i, there, values(i, there));
        sums = _mm512_add_ps(sums, score);
        _mm512_storeu_si512(keys + i, _mm512_and_si512(_mm512_castps_si512(score), _mm512_set1_epi32(0x7fffffff)));
    }
    for (int64_t i = (n + 15) / 16 * 16; i < n + KEYS_MORE; i++) keys[i] = 0;
    const __m512i border = _mm512_set1_epi32((int32_t)border_key(keys, n, s.k, sum((vf)sums) / n, &ties));
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 there = lanes(i);
        const __m512i key = _mm512_loadu_si512(keys + i);
        __mmask16 mask = _mm512_cmpgt_epi32_mask(key, border);
        if (ties > 0) {
            const __mmask16 equal = first_of(_mm512_mask_cmpeq_epi32_mask(there, key, border), ties);
            ties -= __builtin_popcount(equal);
            mask |= equal;
        }
        keep(i, values(i, there), mask);
    }
    return m;
#else
    (void)s, (void)x, (void)n, (void)kept, (void)value, (void)keys;
    return -1;
#endif
}

// Indices of the entries kept, ascending; returns their number. kept: room for n + LANES. keys: for n + KEYS_MORE.
static inline int64_t keep_entries(const Select& s, const float* score, int64_t n, int32_t* kept, uint32_t* keys) {
    if (s.group) return keep_by_groups(s, score, n, kept, (int32_t*)keys);
    if (s.law) {
        Select own = s;
        own.threshold = law_threshold(s, score, n);
        return keep_by_threshold(own, score, n, kept);
    }
    return s.by_rank ? keep_by_rank(score, n, s.k, kept, keys) : keep_by_threshold(s, score, n, kept);
}

}  // namespace ISA
