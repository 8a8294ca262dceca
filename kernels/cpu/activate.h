// Activation functions of gated FFNs, in place.
#pragma once
#include "simd.h"
#include "types.h"

namespace ISA {

static inline vf tanh_of(vf x) {
    const vf e = exp(x * 2.0f);  // 1 - 2 / (e + 1): right at both ends, where e is 0 or infinite
    return 1.0f - 2.0f / (e + 1.0f);
}

static inline vf activated(vf x, int32_t act) {
    if (act == ACT_SILU) return x / (1.0f + exp(-x));
    if (act == ACT_GELU_TANH) return 0.5f * x * (1.0f + tanh_of(0.7978845608f * (x + 0.044715f * x * x * x)));
    if (act == ACT_RELU) return select(x <= 0.0f, (vf){}, x);
    return x;
}

static inline void activate(float* x, int64_t n, int32_t act) {
    if (act == ACT_NONE) return;
    if (act == ACT_GELU) {
        for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + __builtin_erff(x[i] * 0.70710678f));
        return;
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, activated(load(x + i), act));
    if (i < n) {
        float rest[LANES] = {0};
        __builtin_memcpy(rest, x + i, (n - i) * sizeof(float));
        store(rest, activated(load(rest), act));
        __builtin_memcpy(x + i, rest, (n - i) * sizeof(float));
    }
}

}  // namespace ISA
