// Exactly n of every m consecutive entries: those with the largest scores, ties to the lower index.
//
// An entry is kept if fewer than n others of its group beat it. Each entry in turn is spread over a vector and compared with the
// group: there is nothing but comparisons of whole numbers, so every instruction set finds the same entries.
#pragma once
#include "simd.h"

namespace ISA {

constexpr int MAX_GROUP = 64;              // the entries of a group have to fit one word of bits
constexpr int32_t NAN_KEY = 0x7f800001;  // the same for every NaN, above infinity

// A score as a whole number in the scores' order.
static inline int32_t group_key(float score) {
    const int32_t bits = (int32_t)(float_bits(score) & 0x7fffffffu);
    return bits < NAN_KEY ? bits : NAN_KEY;
}

// rank + 1 in the lanes where other > key.
static inline vi beaten(vi rank, vi other, vi key) {
#if ISA_LEVEL == 2
    const __m512i one = _mm512_set1_epi32(1);
    return (vi)_mm512_mask_add_epi32((__m512i)rank, _mm512_cmpgt_epi32_mask((__m512i)other, (__m512i)key), (__m512i)rank, one);
#else
    return rank - (other > key);
#endif
}

static inline vi load_key(const int32_t* p) { return (vi)*(const vi_any*)p; }

// -1 in the lanes after `place`, whose ties the entry there wins: key - 1 is beaten by what equals key.
static inline vi after(int place) {
    static constexpr struct Steps {
        int32_t at[2 * LANES] = {};
        constexpr Steps() {
            for (int i = LANES; i < 2 * LANES; i++) at[i] = -1;
        }
    } steps;
    return load_key(steps.at + LANES - 1 - place);
}

// By how many of a group its entries from `at` on are beaten, LANES of them.
static inline vi ranks(const int32_t* group, int size, int at) {
    const vi key = load_key(group + at);
    const int own = at + LANES < size ? at + LANES : size;
    vi rank = (vi){};
    for (int j = 0; j < at; j++) rank = beaten(rank, group[j] - (vi){}, key - 1);
    for (int j = at; j < own; j++) rank = beaten(rank, group[j] - (vi){}, key + after(j - at));
    for (int j = own; j < size; j++) rank = beaten(rank, group[j] - (vi){}, key);
    return rank;
}

#if ISA_LEVEL > 0
// The same where a vector holds several groups of M: entry j of each is spread over its own lanes.
template <int M> struct Spread {
    int32_t from[M][LANES] = {}, later[M][LANES] = {};
    constexpr Spread() {
        for (int j = 0; j < M; j++)
            for (int lane = 0; lane < LANES; lane++) from[j][lane] = lane - lane % M + j, later[j][lane] = lane % M > j ? -1 : 0;
    }
};
template <int M> static constexpr Spread<M> spread;

template <int M> static inline vi ranks_of_several(vi key) {
    vi rank = (vi){};
#pragma GCC unroll 8
    for (int j = 0; j < M; j++) {
        const vi from = load_key(spread<M>.from[j]), later = load_key(spread<M>.later[j]);
#if ISA_LEVEL == 2
        const vi other = (vi)_mm512_permutexvar_epi32((__m512i)from, (__m512i)key);
#else
        const vi other = (vi)_mm256_permutevar8x32_epi32((__m256i)key, (__m256i)from);
#endif
        rank = beaten(rank, other, key + later);
    }
    return rank;
}
#endif

// Bits of 64 entries, whole groups of M.
template <int M> static inline uint64_t keep_64(const int32_t* keys, int n) {
    uint64_t bits = 0;
    for (int at = 0; at < 64; at += LANES) {
        vi rank;
#if ISA_LEVEL > 0
        if constexpr (M < LANES) rank = ranks_of_several<M>(load_key(keys + at));
        else
#endif
            rank = ranks(keys + at / M * M, M, at % M);
        bits |= (uint64_t)bits_of(rank < n) << at;
    }
    return bits;
}

// Bits of one group of any size.
static inline uint64_t keep_group(const int32_t* keys, int n, int size) {
    const uint64_t all = ~(uint64_t)0 >> (64 - size);
    if (n >= size) return all;
    uint64_t bits = 0;
    for (int at = 0; at < size; at += LANES) bits |= (uint64_t)bits_of(ranks(keys, size, at) < n) << at;
    return bits & all;
}

// Bits of the entries that are kept from `at` on, where a group begins; *size: how many entries they speak of. The last group
// may be shorter than m. keys: whole vectors can be read from every one of them on.
static inline uint64_t keep_next(const int32_t* keys, int64_t at, int64_t width, int n, int m, int* size) {
    *size = 64;
    if (at + 64 <= width) {
        if (m == 4) return keep_64<4>(keys + at, n);
        if (m == 8) return keep_64<8>(keys + at, n);
        if (m == 16) return keep_64<16>(keys + at, n);
        if (m == 32) return keep_64<32>(keys + at, n);
    }
    *size = width - at < m ? (int)(width - at) : m;
    return keep_group(keys + at, n, *size);
}

}  // namespace ISA
