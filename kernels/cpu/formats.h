// How the stored formats become vectors of floats: a unit is one 64-byte line of a row.
#pragma once
#include "simd.h"
#include "types.h"

namespace ISA {

struct F32 {
    static constexpr int unit = 16;
    static constexpr int shared = unit;  // entries that share a scale
    static constexpr bool scaled = false;
    const float* line;
    inline F32() {}
    inline F32(const Weight& w, int64_t row, int64_t col) : line((const float*)w.data + row * w.padded + col) {}
    inline void advance() { line += unit; }
    inline vf get(int v) const { return load(line + v * LANES); }
    inline vf scale(int) const { return splat(1.0f); }
    static inline int64_t row_bytes(const Weight& w) { return w.padded * 4; }
};

struct BF16 {
    static constexpr int unit = 32;
    static constexpr int shared = unit;  // entries that share a scale
    static constexpr bool scaled = false;
    const uint16_t* line;
    inline BF16() {}
    inline BF16(const Weight& w, int64_t row, int64_t col) : line((const uint16_t*)w.data + row * w.padded + col) {}
    inline void advance() { line += unit; }
    inline vf get(int v) const { return load_bf16(line + v * LANES); }
    inline vf scale(int) const { return splat(1.0f); }
    static inline int64_t row_bytes(const Weight& w) { return w.padded * 2; }
};

struct I8 {
    static constexpr int unit = 64;
    static constexpr int shared = unit;  // entries that share a scale
    static constexpr bool scaled = false;  // by output, at the end
    const int8_t* line;
    inline I8() {}
    inline I8(const Weight& w, int64_t row, int64_t col) : line((const int8_t*)w.data + row * w.padded + col) {}
    inline void advance() { line += unit; }
    inline vf get(int v) const { return load_i8(line + v * LANES); }
    inline vf scale(int) const { return splat(1.0f); }
    static inline int64_t row_bytes(const Weight& w) { return w.padded; }
};

// A line is 16 dwords for 128 entries: entry 16 k + l is nibble k of dword l, plus 8. GROUP entries share a scale.
template <int GROUP> struct I4 {
    static constexpr int unit = 128;
    static constexpr int shared = GROUP;
    static constexpr bool scaled = true;
    const uint32_t* line;
    const uint16_t* scales;
    inline I4() {}
    inline I4(const Weight& w, int64_t row, int64_t col)
        : line((const uint32_t*)w.data + (row * w.padded + col) / 8),
          scales((const uint16_t*)w.scales + (row * w.padded + col) / GROUP) {}
    inline void advance() { line += 16, scales += unit / GROUP; }
    inline vf get(int v) const { return nibbles(line + (v * LANES) % 16, v * LANES / 16); }
    // The scale of vector v's entries, in every lane.
    inline vf scale(int v) const { return splat_bf16(scales + v * LANES / GROUP); }
    static inline int64_t row_bytes(const Weight& w) { return w.padded / 2; }
};

template <class F> static inline const char* row_address(const Weight& w, int64_t row) {
    return (const char*)w.data + row * F::row_bytes(w);
}

}  // namespace ISA
