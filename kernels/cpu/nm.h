// N:M pruning as an operator of its own: a token is read, scored, pruned, repaired and written by one thread, without leaving
// its first-level caches.
#pragma once
#include "ops.h"

namespace ISA {

// Keys of scores |x_i - shift_i| * scale_i.
static inline void group_keys(const Select& s, const float* x, int64_t n, int32_t* keys) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf score = load(x + i);
        if (s.shift) score -= load(s.shift + i);
        score = (vf)((vi)score & 0x7fffffff);
        if (s.scale) score *= load(s.scale + i);
        const vi bits = (vi)score & 0x7fffffff;
        *(vi_any*)(keys + i) = (vi)select(bits < NAN_KEY, (vf)bits, (vf)(NAN_KEY - (vi){}));
    }
    for (; i < n; i++) keys[i] = group_key(__builtin_fabsf(s.shift ? x[i] - s.shift[i] : x[i]) * (s.scale ? s.scale[i] : 1.0f));
    for (i = n; i < n + LANES; i++) keys[i] = 0;
}

// Bits one after the other, in pieces of any size up to 64.
struct BitWriter {
    uint8_t* to;
    uint64_t pending = 0;
    int filled = 0;
    inline void add(uint64_t bits, int size) {
        pending |= bits << filled;
        filled += size;
        if (filled < 64) return;
        __builtin_memcpy(to, &pending, 8);
        to += 8, filled -= 64;
        pending = filled ? bits >> (size - filled) : 0;
    }
    inline void finish() { __builtin_memcpy(to, &pending, (filled + 7) / 8); }
};

// out = x where a bit is set, else `dropped` (null: 0).
static inline void keep_where(uint64_t bits, int size, const float* x, const float* dropped, float* out) {
    int i = 0;
    for (; i + LANES <= size; i += LANES)
        store(out + i, select(lanes_of((uint32_t)(bits >> i)), load(x + i), dropped ? load(dropped + i) : (vf){}));
    for (; i < size; i++) out[i] = (bits >> i) & 1 ? x[i] : dropped ? dropped[i] : 0.0f;
}

static inline void nm_token(const NmSelect& a, const Scratch& b, int64_t t) {
    const Select& s = a.select;
    const int64_t n = a.width;
    const bool direct = a.x.format == FORMAT_F32, in_place = a.y.format == FORMAT_F32;
    const float* x = direct ? (const float*)a.x.data + t * a.x.stride : b.x;
    float* out = in_place ? (float*)a.y.data + t * a.y.stride : b.factors;
    if (!direct) read_vector(a.x, t, n, n, b.x);
    int32_t* keys = (int32_t*)b.keys;
    group_keys(s, x, n, keys);
    const float* value = x;  // what is kept of an entry: x itself where a shift only comes and goes
    if (s.shift && (s.repair || !a.back)) {
        for (int64_t i = 0; i < n; i++) b.value[i] = x[i] - s.shift[i];
        value = b.value;
    }
    const float* dropped = a.back && !s.repair ? s.shift : nullptr;
    BitWriter writer{a.bits ? a.bits + t * ((n + 7) / 8) : nullptr};
    for (int64_t at = 0; at < n;) {
        int size;
        const uint64_t bits = keep_next(keys, at, n, (int)s.k, s.group, &size);
        keep_where(bits, size, value + at, dropped ? dropped + at : nullptr, out + at);
        if (a.bits) writer.add(bits, size);
        at += size;
    }
    if (a.bits) writer.finish();
    if (s.repair) {
        const float factor = repair_factor(value, out, n);
        for (int64_t i = 0; i < n; i++) out[i] = out[i] == 0.0f ? 0.0f : out[i] * factor;  // no NaN where it was dropped
        asm volatile("" ::: "memory");  // multiplied and added in two steps, on every processor
        if (a.back && s.shift)
            for (int64_t i = 0; i < n; i++) out[i] += s.shift[i];
    }
    if (!in_place) write_vector(a.y, t, 0, n, out);
}

static void nm_select(const Team& team, const NmSelect& a) {
    for (int64_t t = team.begin(a.x.batch); t < team.end(a.x.batch); t++) nm_token(a, a.scratch[team.index], t);
}

}  // namespace ISA
