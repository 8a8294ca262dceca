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

// scores -> exp(scores - highest), and their sum. scores: room for whole vectors.
static inline float exponentials(float* scores, int64_t n, float highest) {
    for (int64_t t = n; t % LANES; t++) scores[t] = -__builtin_inff();
    vf sums = (vf){};
    for (int64_t t = 0; t < n; t += LANES) {
        const vf e = exp(load(scores + t) - highest);
        store(scores + t, e);
        sums += e;
    }
    return sum(sums);
}

// V: vectors of a head. Sums stay in registers: the compiler cannot know that caches and scores do not overlap them.
template <class C, int V>
static void attention_of(const float* q, const void* keys, const void* values, int64_t base, int64_t start, int64_t stop,
                         float scaling, float cap, float* scores, float* out) {
    constexpr int64_t d = V * LANES;
    vf query[V], sums[V];
    for (int v = 0; v < V; v++) query[v] = load(q + v * LANES), sums[v] = (vf){};
    float highest = -__builtin_inff();
    for (int64_t t = start; t < stop; t++) {
        vf total = query[0] * C::get(keys, base + t * d);
        for (int v = 1; v < V; v++) total += query[v] * C::get(keys, base + t * d + v * LANES);
        float score = sum(total) * scaling;
        if (cap > 0.0f) score = cap * __builtin_tanhf(score / cap);
        scores[t - start] = score;
        highest = score > highest ? score : highest;
    }
    const float factor = 1.0f / exponentials(scores, stop - start, highest);
    for (int64_t t = start; t < stop; t++) {
        const float weight = scores[t - start] * factor;
        for (int v = 0; v < V; v++) sums[v] += weight * C::get(values, base + t * d + v * LANES);
    }
    for (int v = 0; v < V; v++) store(out + v * LANES, sums[v]);
}

// Heads of any other size.
template <class C>
static void attention_of_any(const float* q, const void* keys, const void* values, int64_t base, int64_t start, int64_t stop,
                             int64_t d, float scaling, float cap, float* scores, float* out) {
    float highest = -__builtin_inff();
    for (int64_t t = start; t < stop; t++) {
        float score = 0.0f;
        for (int64_t i = 0; i < d; i++) score += q[i] * C::one(keys, base + t * d + i);
        score *= scaling;
        if (cap > 0.0f) score = cap * __builtin_tanhf(score / cap);
        scores[t - start] = score;
        highest = score > highest ? score : highest;
    }
    const float factor = 1.0f / exponentials(scores, stop - start, highest);
    for (int64_t i = 0; i < d; i++) out[i] = 0.0f;
    for (int64_t t = start; t < stop; t++)
        for (int64_t i = 0; i < d; i++) out[i] += scores[t - start] * factor * C::one(values, base + t * d + i);
}

template <class C>
static void attention_with(const float* q, const void* keys, const void* values, int64_t base, int64_t start, int64_t stop,
                           int64_t d, float scaling, float cap, float* scores, float* out) {
    switch (d) {
        case 64: return attention_of<C, 64 / LANES>(q, keys, values, base, start, stop, scaling, cap, scores, out);
        case 128: return attention_of<C, 128 / LANES>(q, keys, values, base, start, stop, scaling, cap, scores, out);
        case 256: return attention_of<C, 256 / LANES>(q, keys, values, base, start, stop, scaling, cap, scores, out);
        default: return attention_of_any<C>(q, keys, values, base, start, stop, d, scaling, cap, scores, out);
    }
}

static void attention_head(const float* q, const void* keys, const void* values, int32_t format, int64_t base, int64_t start,
                           int64_t stop, int64_t d, float scaling, float cap, float* scores, float* out) {
    if (format == FORMAT_F32)
        attention_with<CacheF32>(q, keys, values, base, start, stop, d, scaling, cap, scores, out);
    else
        attention_with<CacheBF16>(q, keys, values, base, start, stop, d, scaling, cap, scores, out);
}

}  // namespace ISA
