// Buffers of a call: taken by the calling thread before the team starts, so that no thread of it ever has to fail.
#pragma once
#include <stdlib.h>

#include "fence.h"
#include "ops_args.h"

constexpr int64_t ACCUMULATORS = 8192;  // linear.h: BLOCK, and tokens times the smallest block
constexpr int MAX_THREADS = 256;

namespace {

// One growing buffer a calling thread, so that callers do not share it.
struct Workspace {
    char* data = nullptr;
    size_t size = 0;
    ~Workspace() { free(data); }
    char* reserve(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = 0;
            data = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (data) size = bytes;
        }
        if (data) open_memory(data, bytes);  // the call before may have left fences elsewhere
        return data;
    }
};
static thread_local Workspace workspace;

// Hands out pieces of the workspace; with a null base it only counts.
struct Carver {
    char* base;
    size_t used = 0;
    template <class T> T* take(int64_t count) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(T), room = (bytes + 63) / 64 * 64 + FENCE;
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        if (base) close_memory(base + used + bytes, room - bytes);
        used += room;
        return piece;
    }
};

// twice: for stripes, of which the next one's rows are chosen while one is read.
inline Scratch carve(Carver& c, int64_t n, int64_t batch, bool twice) {
    Scratch s;
    s.x = c.take<float>(batch * n);
    s.value = c.take<float>(n);
    s.score = c.take<float>(n);
    s.factors = c.take<float>(batch * n + ROWS_MORE);
    s.acc = c.take<float>(2 * ACCUMULATORS);
    s.rows = c.take<int32_t>(n + ROWS_MORE + ROWS_AHEAD);
    s.marks = c.take<uint16_t>(n);
    s.keys = c.take<uint32_t>(n + KEYS_MORE);
    s.next_rows = twice ? c.take<int32_t>(n + ROWS_MORE + ROWS_AHEAD) : nullptr;
    s.next_factors = twice ? c.take<float>(batch * n + ROWS_MORE) : nullptr;
    return s;
}

// Buffers for `threads` threads, and `extra` floats for each of `pieces` shared ones.
inline bool prepare(int64_t n, int64_t batch, int threads, Scratch* scratch, int pieces, const int64_t* extra, float** shared,
                    bool twice = false) {
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) {
            char* base = workspace.reserve(carver.used);
            if (!base) return false;
            carver = Carver{base};
        }
        for (int i = 0; i < threads; i++) scratch[i] = carve(carver, n, batch, twice);
        for (int i = 0; i < pieces; i++) shared[i] = carver.take<float>(extra[i]);
    }
    return true;
}

// Floats that the parts of a product with divided rows take.
inline int64_t parts_of(const Weight& w, int tokens) { return w.padded * tokens <= SHARED_SUMS ? SHARES * tokens * w.padded : 0; }

}  // namespace
