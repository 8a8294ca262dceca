// How the stored formats become vectors of floats: a unit is one 64-byte line of a row.
#pragma once
#include "simd.h"
#include "types.h"

namespace ISA {

struct F32 {
    static constexpr bool in_pairs = false;  // whether vectors hold even and odd entries apart
    static constexpr int unit = 16;
    static constexpr int shared = unit;  // entries that share a scale
    static constexpr bool scaled = false;
    const float* line;
    inline F32() {}
    inline F32(const Weight& w, int64_t row, int64_t col) : line((const float*)w.data + row * w.stride + col) {}
    inline void advance() { line += unit; }
    inline vf get(int v) const { return load(line + v * LANES); }
    static inline int64_t pitch(const Weight& w) { return w.stride * 4; }
};

struct BF16 {
    static constexpr bool in_pairs = true;
    static constexpr int unit = 32;
    static constexpr int shared = unit;  // entries that share a scale
    static constexpr bool scaled = false;
    const uint16_t* line;
    inline BF16() {}
    inline BF16(const Weight& w, int64_t row, int64_t col) : line((const uint16_t*)w.data + row * w.stride + col) {}
    inline void advance() { line += unit; }
    // Vectors 2 q and 2 q + 1 are the even and the odd entries of 2 LANES: one load, a shift and a mask widen both. Those who
    // multiply or add up such vectors have to `arrange` or `settle` what they meet (below).
    inline vf get(int v) const {
        const vu both = *(const vu_any*)(line + v / 2 * 2 * LANES);
        return v % 2 ? (vf)(both & 0xffff0000u) : (vf)(both << 16);
    }
    static inline int64_t pitch(const Weight& w) { return w.stride * 2; }
};

struct I8 {
    static constexpr bool in_pairs = false;
    static constexpr int unit = 64;
    static constexpr int shared = unit;  // entries that share a scale
    static constexpr bool scaled = false;  // by output, at the end
    const int8_t* line;
    inline I8() {}
    inline I8(const Weight& w, int64_t row, int64_t col) : line((const int8_t*)w.data + row * w.stride + col) {}
    inline void advance() { line += unit; }
    inline vf get(int v) const { return load_i8(line + v * LANES); }
    static inline int64_t pitch(const Weight& w) { return w.stride; }
};

// A line is 16 dwords for 128 entries: entry 16 k + l is nibble k of dword l, plus 8. GROUP entries share a scale.
template <int GROUP> struct I4 {
    static constexpr bool in_pairs = false;
    static constexpr int unit = 128;
    static constexpr int shared = GROUP;
    static constexpr bool scaled = true;
    const uint32_t* line;
    inline I4() {}
    inline I4(const Weight& w, int64_t row, int64_t col)
        : line((const uint32_t*)w.data + (row * w.stride + col) / 8) {}
    inline void advance() { line += 16; }
    inline vf get(int v) const { return nibbles(line + (v * LANES) % 16, v * LANES / 16); }
    static inline int64_t pitch(const Weight& w) { return w.stride / 2; }
};

// Scales of `count` groups of a row from entry `col` on, times `factor`. Widened here once: doing it between the products
// costs more than these.
template <class F>
static inline void read_scales(const Weight& w, int64_t row, int64_t col, int64_t count, float factor, float* out) {
    const uint16_t* from = (const uint16_t*)w.scales + (row * w.padded + col) / F::shared;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, load_bf16(from + i) * factor);
    for (; i < count; i++) out[i] = from_bf16(from[i]) * factor;
}

// Scales lie apart from the rows: they are fetched a pass ahead.
template <class F> static inline void fetch_scales(const Weight& w, int64_t row, int64_t col, int64_t count) {
    const char* from = (const char*)((const uint16_t*)w.scales + (row * w.padded + col) / F::shared);
    for (int64_t at = 0; at < 2 * count; at += 64) prefetch(from + at);
}

// n floats (whole lines of the format) in the order of the format's vectors; from and to may be the same.
template <class F> static inline void arrange(const float* from, int64_t n, float* to) {
    if (!F::in_pairs) {
        if (from != to) __builtin_memcpy(to, from, n * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        float even[LANES], odd[LANES];
        for (int lane = 0; lane < LANES; lane++) even[lane] = from[i + 2 * lane], odd[lane] = from[i + 2 * lane + 1];
        store(to + i, load(even)), store(to + i + LANES, load(odd));
    }
}

// And back, in place.
template <class F> static inline void settle(float* x, int64_t n) {
    if (!F::in_pairs) return;
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        float pairs[2 * LANES];
        for (int lane = 0; lane < LANES; lane++) pairs[2 * lane] = x[i + lane], pairs[2 * lane + 1] = x[i + LANES + lane];
        store(x + i, load(pairs)), store(x + i + LANES, load(pairs + LANES));
    }
}

// Memory from a row to the next, and what of it is the row's own.
template <class F> static inline const char* row_address(const Weight& w, int64_t row) {
    return (const char*)w.data + row * F::pitch(w);
}
template <class F> static inline int64_t row_bytes(const Weight& w) { return w.padded / F::unit * 64; }

}  // namespace ISA
