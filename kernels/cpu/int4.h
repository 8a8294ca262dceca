// A pass over rows of int4 for one token of bfloat16, in whole numbers: widening every weight to a float would take longer than
// reading it.
//
// What a row's weights are multiplied by, x_n s_ng (g: a group of entries that share a scale), is rounded to 16 bits in units of
// the largest of the pass's N rows; the sum over the rows is then exact, and becomes a float once for each output. So a product
// is off by at most 2^-16 of the largest of N.
#pragma once
#include "formats.h"

namespace ISA {

// total + the sums of two products of 16-bit numbers that lie side by side.
static inline vi add_pairs(vi total, vi a, vi b) {
#if ISA_LEVEL == 2 && defined(ISA_VNNI)
    return (vi)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif ISA_LEVEL == 2
    return total + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif ISA_LEVEL == 1
    return total + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return total + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return total + (vi)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
    return total + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

constexpr float WHOLE = 32767.0f;
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number

// The factors of a pass as whole numbers.
template <int N, int GROUPS> struct Whole {
    int32_t pairs[N / 2][GROUPS + LANES];  // two rows' factors in one word
    int32_t offset[GROUPS + LANES];        // stored weights are 8 too large: minus 8 times the sum of the factors
    float unit[GROUPS + LANES];
};

// factors: [N][groups], room for whole vectors. Returns whether whole numbers can hold them: not NaN, infinite or tiny ones.
template <int N, int GROUPS, int ROOM>
static inline bool to_whole(float (&factors)[N][ROOM], int64_t groups, Whole<N, GROUPS>& w) {
    for (int64_t g = groups; g % LANES; g++)
        for (int n = 0; n < N; n++) factors[n][g] = 0.0f;
    vi good = (vi){} - 1;
    for (int64_t g = 0; g < groups; g += LANES) {
        vi bits = (vi){};  // sizes in the order of whole numbers, NaN the largest
        for (int n = 0; n < N; n++) {
            const vi size = (vi)load(factors[n] + g) & 0x7fffffff;
            bits = size > bits ? size : bits;
        }
        const vf largest = (vf)bits;
        good &= ((largest >= 1e-30f) & (largest <= 1e30f)) | (bits == 0);
        const vf inverse = select(bits > 0, WHOLE / largest, (vf){});
        vu sum = (vu){};  // unsigned: what does not fit is not used
        for (int n = 0; n < N; n += 2) {
            const vu a = (vu)(load(factors[n] + g) * inverse + ROUNDER) - 0x4b400000u;  // the bits of ROUNDER
            const vu b = (vu)(load(factors[n + 1] + g) * inverse + ROUNDER) - 0x4b400000u;
            sum += a + b;
            *(vi_any*)(w.pairs[n / 2] + g) = (vi)((a & 0xffffu) | (b << 16));
        }
        *(vi_any*)(w.offset + g) = (vi)(sum * -8u);
        store(w.unit + g, largest * (1.0f / WHOLE));
    }
    int32_t all = -1;
    for (int lane = 0; lane < LANES; lane++) all &= good[lane];
    return all != 0;
}

// acc[o] += `bytes` of each row, times w. here: the rows, `ahead` bytes further on, as far as they are fetched before they are
// used; there: the same of the next rows, whose first bytes follow this pass's last ones.
template <class F, int N, int GROUPS>
static inline void add_whole(const char* const (&here)[N], const char* const (&there)[N], const Whole<N, GROUPS>& w,
                             float* acc, int64_t bytes, int64_t ahead) {
    constexpr int SHARED = F::shared / 16;  // of the 8 nibbles of a dword, so many in a row belong to one group
    constexpr int PARTS = F::unit / F::shared;
    for (int64_t place = 0, group = 0; place < bytes; place += 64, group += PARTS) {
        for (int n = 0; n < N; n++) prefetch((place < bytes - ahead ? here[n] : there[n]) + place);
        for (int v = 0; v < 16; v += LANES) {
            const int64_t at = place - ahead + 4 * v;
            vi total[8];
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) total[k] = (vi)(((vu)(w.offset[group + k / SHARED] - (vi){})) << (k % 4 == 3 ? 0u : 4u * (k % 4)));
#pragma GCC unroll 8
            for (int n = 0; n < N; n += 2) {
                const vu a = *(const vu_any*)(here[n] + at), b = *(const vu_any*)(here[n + 1] + at);
                const vu both[2] = {(a & 0xffffu) | (b << 16), (a >> 16) | (b & 0xffff0000u)};
#pragma GCC unroll 8
                for (int k = 0; k < 8; k++) {  // where a nibble stands makes it 1, 16 or 256 times as large
                    const vu four = both[k / 4];
                    const vu nibble = k % 4 == 3 ? (vu)((vw)four >> 12) : four & (0x000f000fu << (4 * (k % 4)));
                    total[k] = add_pairs(total[k], (vi)nibble, w.pairs[n / 2][group + k / SHARED] - (vi){});
                }
            }
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                const float unit = w.unit[group + k / SHARED] * (k % 4 == 1 ? 0.0625f : k % 4 == 2 ? 0.00390625f : 1.0f);
                float* target = acc + 2 * place + 16 * k + v;
                store(target, load(target) + __builtin_convertvector(total[k], vf) * unit);
            }
        }
    }
}

}  // namespace ISA
