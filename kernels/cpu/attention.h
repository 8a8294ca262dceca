// Attention of one query over the cache, head by head.
#pragma once
#include "formats.h"

namespace ISA {

// Rotary embedding, halves apart as in Hugging Face: (a, b) -> (a cos - b sin, b cos + a sin).
static inline void rotate(float* x, const float* cosine, const float* sine, int64_t d) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

static inline void remember(void* cache, int32_t format, int64_t at, const float* x, int64_t d) {
    if (format == FORMAT_F32) {
        __builtin_memcpy((float*)cache + at, x, d * sizeof(float));
    } else {
        for (int64_t i = 0; i < d; i++) ((uint16_t*)cache)[at + i] = to_bf16(x[i]);
    }
}

struct CacheF32 {
    static inline vf get(const void* cache, int64_t at) { return load((const float*)cache + at); }
    static inline float one(const void* cache, int64_t at) { return ((const float*)cache)[at]; }
};
struct CacheBF16 {
    static inline vf get(const void* cache, int64_t at) { return load_bf16((const uint16_t*)cache + at); }
    static inline float one(const void* cache, int64_t at) { return from_bf16(((const uint16_t*)cache)[at]); }
};

template <class C>
static void attention_of(const float* q, const void* keys, const void* values, int64_t base, int64_t start, int64_t stop,
                         int64_t d, float scaling, float cap, float* scores, float* out) {
    float highest = -__builtin_inff();
    for (int64_t t = start; t < stop; t++) {
        vf total = (vf){};
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES) total += load(q + i) * C::get(keys, base + t * d + i);
        float score = sum(total);
        for (; i < d; i++) score += q[i] * C::one(keys, base + t * d + i);
        score *= scaling;
        if (cap > 0.0f) score = cap * __builtin_tanhf(score / cap);
        scores[t - start] = score;
        highest = score > highest ? score : highest;
    }
    const int64_t n = stop - start;
    for (int64_t t = n; t % LANES; t++) scores[t] = -__builtin_inff();
    vf sums = (vf){};
    for (int64_t t = 0; t < n; t += LANES) {
        const vf e = exp(load(scores + t) - highest);
        store(scores + t, e);
        sums += e;
    }
    const float factor = 1.0f / sum(sums);
    for (int64_t i = 0; i < d; i++) out[i] = 0.0f;
    for (int64_t t = 0; t < n; t++) {
        const float weight = scores[t] * factor;
        const int64_t at = base + (start + t) * d;
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES) store(out + i, load(out + i) + weight * C::get(values, at + i));
        for (; i < d; i++) out[i] += weight * C::one(values, at + i);
    }
}

static void attention_head(const float* q, const void* keys, const void* values, int32_t format, int64_t base, int64_t start,
                           int64_t stop, int64_t d, float scaling, float cap, float* scores, float* out) {
    if (format == FORMAT_F32)
        attention_of<CacheF32>(q, keys, values, base, start, stop, d, scaling, cap, scores, out);
    else
        attention_of<CacheBF16>(q, keys, values, base, start, stop, d, scaling, cap, scores, out);
}

}  // namespace ISA
