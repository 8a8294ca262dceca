// Attention of one query over the cache.
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

// G heads, which share their keys and values, so that each of these is read and widened once. V: vectors of a head. Sums stay in
// registers: the compiler cannot know that caches and scores do not overlap them. scores: [G][pitch].
template <class C, int V, int G>
static void attention_of(const float* q, const void* keys, const void* values, int64_t base, int64_t start, int64_t stop,
                         float scaling, float cap, float* scores, int64_t pitch, float* out) {
    constexpr int64_t d = V * LANES;
    constexpr int PART = V < 4 ? V : 4;  // vectors of a head that are summed at a time
    vf query[G][V];
    float highest[G], factor[G];
    for (int g = 0; g < G; g++) {
        highest[g] = -__builtin_inff();
        for (int v = 0; v < V; v++) query[g][v] = load(q + g * d + v * LANES);
    }
    for (int64_t t = start; t < stop; t++) {
        vf total[G];
        for (int g = 0; g < G; g++) total[g] = (vf){};
        for (int v = 0; v < V; v++) {
            const vf key = C::get(keys, base + t * d + v * LANES);
            for (int g = 0; g < G; g++) total[g] += query[g][v] * key;
        }
        for (int g = 0; g < G; g++) {
            float score = sum(total[g]) * scaling;
            if (cap > 0.0f) score = cap * __builtin_tanhf(score / cap);
            scores[g * pitch + t - start] = score;
            highest[g] = score > highest[g] ? score : highest[g];
        }
    }
    for (int g = 0; g < G; g++) factor[g] = 1.0f / exponentials(scores + g * pitch, stop - start, highest[g]);
    for (int part = 0; part < V; part += PART) {
        vf sums[G][PART];
        for (int g = 0; g < G; g++)
            for (int v = 0; v < PART; v++) sums[g][v] = (vf){};
        for (int64_t t = start; t < stop; t++) {
            vf value[PART];
            for (int v = 0; v < PART; v++) value[v] = C::get(values, base + t * d + (part + v) * LANES);
            for (int g = 0; g < G; g++) {
                const float weight = scores[g * pitch + t - start] * factor[g];
                for (int v = 0; v < PART; v++) sums[g][v] += weight * value[v];
            }
        }
        for (int g = 0; g < G; g++)
            for (int v = 0; v < PART; v++) store(out + g * d + (part + v) * LANES, sums[g][v]);
    }
}

template <class C, int V>
static void attention_of_group(int heads, const float* q, const void* keys, const void* values, int64_t base, int64_t start,
                               int64_t stop, float scaling, float cap, float* scores, int64_t pitch, float* out) {
    switch (heads) {
        case 1: return attention_of<C, V, 1>(q, keys, values, base, start, stop, scaling, cap, scores, pitch, out);
        case 2: return attention_of<C, V, 2>(q, keys, values, base, start, stop, scaling, cap, scores, pitch, out);
        case 3: return attention_of<C, V, 3>(q, keys, values, base, start, stop, scaling, cap, scores, pitch, out);
        default: return attention_of<C, V, 4>(q, keys, values, base, start, stop, scaling, cap, scores, pitch, out);
    }
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
static void attention_with(int heads, const float* q, const void* keys, const void* values, int64_t base, int64_t start,
                           int64_t stop, int64_t d, float scaling, float cap, float* scores, int64_t pitch, float* out) {
    switch (d) {
        case 64: return attention_of_group<C, 64 / LANES>(heads, q, keys, values, base, start, stop, scaling, cap, scores, pitch, out);
        case 128: return attention_of_group<C, 128 / LANES>(heads, q, keys, values, base, start, stop, scaling, cap, scores, pitch, out);
        case 256: return attention_of_group<C, 256 / LANES>(heads, q, keys, values, base, start, stop, scaling, cap, scores, pitch, out);
        default:
            for (int h = 0; h < heads; h++)
                attention_of_any<C>(q + h * d, keys, values, base, start, stop, d, scaling, cap, scores, out + h * d);
    }
}

// `heads` heads, at most HEADS_TOGETHER, one after the other in q and out, of the same keys and values.
static void attention_heads(int heads, const float* q, const void* keys, const void* values, int32_t format, int64_t base,
                            int64_t start, int64_t stop, int64_t d, float scaling, float cap, float* scores, int64_t pitch,
                            float* out) {
    if (format == FORMAT_F32)
        attention_with<CacheF32>(heads, q, keys, values, base, start, stop, d, scaling, cap, scores, pitch, out);
    else
        attention_with<CacheBF16>(heads, q, keys, values, base, start, stop, d, scaling, cap, scores, pitch, out);
}

}  // namespace ISA
