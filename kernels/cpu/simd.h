// Vectors of LANES floats, written once for every instruction set.
//
// A translation unit per instruction set (isa_*.cpp) defines LANES, ISA and ISA_LEVEL and includes this; the compiler's vector
// extensions do the rest, so AVX-512, AVX2, NEON and plain SSE2 run the same source. No standard headers with inline
// functions here: compiled for AVX-512 they could be picked by the linker for machines without it.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ISA {

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint16_t vw __attribute__((vector_size(4 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));
typedef double vd __attribute__((vector_size(4 * LANES)));  // half as many
// The same, at any address.
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t vb_any __attribute__((vector_size(LANES), aligned(1), may_alias));

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline void store(float* p, vf v) { *(vf_any*)p = v; }
static inline vf splat(float x) { return x - (vf){}; }

// Widening by intrinsics: what compilers make of __builtin_convertvector here takes lanes apart one by one.
static inline vf load_bf16(const uint16_t* p) {
#if ISA_LEVEL == 2
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif ISA_LEVEL == 1
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#elif defined(__x86_64__)
    return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
#elif defined(__aarch64__)
    return (vf)vshll_n_u16(vld1_u16(p), 16);
#else
    return (vf)(__builtin_convertvector((vh)*(const vh_any*)p, vu) << 16);
#endif
}

static inline vf load_i8(const int8_t* p) {
#if ISA_LEVEL == 2
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif ISA_LEVEL == 1
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(__x86_64__)
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const __m128i bytes = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(bytes, bytes);
    return (vf)_mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
#elif defined(__aarch64__)
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8((uint32_t)four)))));
#else
    return __builtin_convertvector(__builtin_convertvector((vb)*(const vb_any*)p, vi), vf);
#endif
}

// Lane l of the result: the k-th nibble of dword l, minus 8.
static inline vf nibbles(const uint32_t* p, int k) {
    const vu moved = (vu)*(const vu_any*)p >> (uint32_t)(4 * k);
#if ISA_LEVEL == 2
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps((__m512i)moved, table);
#else
    return __builtin_convertvector((vi)(moved & 15u), vf) - 8.0f;
#endif
}

static inline float sum(vf v) {
#if ISA_LEVEL == 2
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
#endif
}

// Into the second-level cache: more lines can be on their way to it than to the first.
static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

static inline float from_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// The lower and the upper half of a vector as doubles.
static inline vd widen_low(vf v) {
#if ISA_LEVEL == 2
    return (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
#elif ISA_LEVEL == 1
    return (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
#elif defined(__x86_64__)
    return (vd)_mm_cvtps_pd((__m128)v);
#elif defined(__aarch64__)
    return (vd)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
#else
    return (vd){v[0], v[1]};
#endif
}

static inline vd widen_high(vf v) {
#if ISA_LEVEL == 2
    return (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif ISA_LEVEL == 1
    return (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#elif defined(__x86_64__)
    return (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#elif defined(__aarch64__)
    return (vd)vcvt_high_f64_f32((float32x4_t)v);
#else
    return (vd){v[2], v[3]};
#endif
}

// Bit l: whether lane l of a mask is set.
static inline uint32_t bits_of(vi mask) {
#if ISA_LEVEL == 2
    return _mm512_movepi32_mask((__m512i)mask);
#elif ISA_LEVEL == 1
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
    return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
    const vi own = mask & (vi){1, 2, 4, 8};
    return (uint32_t)(own[0] | own[1] | own[2] | own[3]);
#endif
}

// And back: lane l is all ones where bit l is set.
static inline vi lanes_of(uint32_t bits) {
#if ISA_LEVEL == 2
    return (vi)_mm512_movm_epi32((__mmask16)bits);
#elif ISA_LEVEL == 1
    const vi own = {1, 2, 4, 8, 16, 32, 64, 128};
    return ((int32_t)bits & own) == own;
#else
    const vi own = {1, 2, 4, 8};
    return ((int32_t)bits & own) == own;
#endif
}

static inline vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// exp(x) to about 2 ulp: 2^n * p(r) with |r| <= ln(2)/2. NaN stays NaN, large x becomes infinity, small x 0.
static inline vf exp(vf x) {
    const vf high = splat(88.7228317f), low = splat(-87.3365479f);
    const vf inside = select(x < low, low, select(x > high, high, x));
    const vf scaled = inside * 1.44269504f;
    const vf shifted = scaled + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits now hold round(scaled)
    const vf n = shifted - 12582912.0f;
    const vf r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vi exponent = __builtin_convertvector(n, vi);
    // In two factors, so that 2^128 need not exist.
    const vi half = exponent >> 1;
    const vf a = (vf)((half + 127) << 23), b = (vf)((exponent - half + 127) << 23);
    const vf found = p * a * b;
    const vf infinite = splat(__builtin_inff());
    return select(x != x, x, select(x > high, infinite, select(x < low, (vf){}, found)));
}

}  // namespace ISA
