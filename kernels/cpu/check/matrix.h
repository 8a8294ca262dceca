// Matrices in the four formats and batches of vectors in two, exactly as large as they say, so that a sanitizer sees every step
// beyond.
#pragma once
#include "common.h"

inline uint16_t bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (isnan(x)) return uint16_t((bits >> 16) | 64);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float wide(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

struct Stored {  // a format, and the group of int4
    int32_t format, group;
};
constexpr Stored STORED[] = {{FORMAT_F32, 0}, {FORMAT_BF16, 0}, {FORMAT_I8, 0}, {FORMAT_I4, 32}, {FORMAT_I4, 128}};

struct Matrix {
    std::vector<float> values;  // what is stored, in float
    std::vector<uint8_t> data, scales;
    Weight weight{};
    float at(int64_t row, int64_t col) const { return values[row * weight.cols + col]; }
    // The scale of an entry of int4.
    float scale_at(int64_t row, int64_t col) const {
        const uint32_t bits = uint32_t(((const uint16_t*)scales.data())[(row * weight.padded + col) / weight.group]) << 16;
        float scale;
        return memcpy(&scale, &bits, 4), scale;
    }
    int64_t row_bytes() const {
        const int64_t bits[] = {32, 16, 8, 4};
        return weight.padded * bits[weight.format] / 8;
    }
};

namespace detail {

inline void put(Matrix& m, int64_t r, int64_t c, float size, bool scale_by_row) {
    const Weight& w = m.weight;
    uint8_t* row = m.data.data() + r * m.row_bytes();
    float& value = m.values[r * w.cols + c];
    if (w.format == FORMAT_F32) {
        value = size * normal();
        memcpy(row + c * 4, &value, 4);
    } else if (w.format == FORMAT_BF16) {
        const uint16_t h = bf16(size * normal());
        value = wide(h);
        memcpy(row + c * 2, &h, 2);
    } else if (w.format == FORMAT_I8) {
        const int8_t q = int8_t(below(255) - 127);
        float scale;
        memcpy(&scale, &m.scales[(scale_by_row ? r : c) * 4], 4);
        value = float(q) * scale;
        memcpy(row + c, &q, 1);
    } else {
        const int level = below(16);
        uint16_t scale;
        memcpy(&scale, &m.scales[(r * w.padded + c) / w.group * 2], 2);
        value = float(level - 8) * wide(scale);
        uint32_t word;
        uint8_t* place = row + c / 128 * 64 + (c % 16) * 4;
        memcpy(&word, place, 4);
        word |= uint32_t(level) << (4 * (c % 128 / 16));
        memcpy(place, &word, 4);
    }
}

}  // namespace detail

// Entries of about `size`. scale_by_row: the rows are the outputs, of which each has a scale in int8.
inline Matrix matrix(int64_t rows, int64_t cols, Stored stored, bool scale_by_row, float size = 1) {
    const int unit[] = {16, 32, 64, 128};
    const int64_t padded = (cols + unit[stored.format] - 1) / unit[stored.format] * unit[stored.format];
    Matrix m;
    m.weight = Weight{nullptr, nullptr, rows, cols, padded, padded, stored.format, stored.group, 0};
    m.values.resize(rows * cols);
    m.data.assign(rows * m.row_bytes(), 0);
    if (stored.format == FORMAT_I8)
        for (int64_t i = 0; i < (scale_by_row ? rows : cols); i++) {
            const float scale = size * (0.012f + 0.001f * float(i % 7));
            m.scales.insert(m.scales.end(), (const uint8_t*)&scale, (const uint8_t*)&scale + 4);
        }
    if (stored.format == FORMAT_I4)
        for (int64_t i = 0; i < rows * padded / stored.group; i++) {
            const uint16_t scale = bf16(size * (0.15f + 0.03f * float(i % 5)));
            m.scales.insert(m.scales.end(), (const uint8_t*)&scale, (const uint8_t*)&scale + 2);
        }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) detail::put(m, r, c, size, scale_by_row);
    m.weight.data = m.data.data(), m.weight.scales = m.scales.empty() ? nullptr : m.scales.data();
    return m;
}

// Rows of two matrices in turn, in one buffer, which is returned and which both then use.
inline std::vector<uint8_t> side_by_side(Matrix& a, Matrix& b) {
    const int64_t bytes = a.row_bytes(), more = b.row_bytes();
    std::vector<uint8_t> both(a.weight.rows * (bytes + more));
    for (int64_t r = 0; r < a.weight.rows; r++) {
        memcpy(&both[r * (bytes + more)], &a.data[r * bytes], bytes);
        memcpy(&both[r * (bytes + more) + bytes], &b.data[r * more], more);
    }
    a.weight.data = both.data(), b.weight.data = both.data() + bytes;
    a.weight.stride = b.weight.stride = a.weight.padded + b.weight.padded;
    return both;
}

// Vectors a few entries further apart than they are wide; what lies between must stay as it is.
struct Batch {
    static constexpr int64_t GAP = 3;
    static constexpr uint8_t FILL = 0xa5;
    int tokens;
    int64_t width;
    int32_t format;
    std::vector<uint8_t> data;

    Batch(int tokens, int64_t width, int32_t format) : tokens(tokens), width(width), format(format) {
        data.assign((tokens * (width + GAP) - GAP) * size(), FILL);
    }
    int64_t size() const { return format == FORMAT_F32 ? 4 : 2; }
    int64_t place(int t, int64_t i) const { return (t * (width + GAP) + i) * size(); }
    float at(int t, int64_t i) const {
        float x;
        uint16_t h;
        if (format == FORMAT_F32) return memcpy(&x, &data[place(t, i)], 4), x;
        return memcpy(&h, &data[place(t, i)], 2), wide(h);
    }
    void set(int t, int64_t i, float x) {
        const uint16_t h = bf16(x);
        memcpy(&data[place(t, i)], format == FORMAT_F32 ? (const void*)&x : &h, size());
    }
    // The batch as the operators take it, or one token of it alone.
    Vectors vectors() { return {data.data(), width + GAP, format, tokens}; }
    Vectors alone(int t) { return {data.data() + place(t, 0), width + GAP, format, 1}; }
    bool gaps_untouched() const {
        for (int t = 0; t + 1 < tokens; t++)
            for (int64_t b = place(t, width); b < place(t + 1, 0); b++)
                if (data[b] != FILL) return false;
        return true;
    }
};

inline Batch random_batch(int tokens, int64_t width, int32_t format) {
    Batch found(tokens, width, format);
    for (int t = 0; t < tokens; t++)
        for (int64_t i = 0; i < width; i++) found.set(t, i, normal());
    return found;
}

// Every entry against what it has to be.
inline void compare(const char* what, const Batch& found, const std::vector<Bounded>& expected) {
    const double relative = found.format == FORMAT_BF16 ? 0x1p-8 : 0;  // rounding to bfloat16
    for (int t = 0; t < found.tokens; t++)
        for (int64_t i = 0; i < found.width; i++) {
            const Bounded& one = expected[t * found.width + i];
            if (near(found.at(t, i), one, relative)) continue;
            return expect(false, "%s: token %d, entry %ld is %g, expected %g within %g", what, t, long(i), found.at(t, i),
                          one.value, one.error + relative * fabs(one.value));
        }
    expect(found.gaps_untouched(), "%s: wrote between the vectors", what);
}
