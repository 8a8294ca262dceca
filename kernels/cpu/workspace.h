// Buffers of a call: taken by the calling thread before the team starts, so that no thread of it ever has to fail.
#pragma once
#include <stdlib.h>

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
        return data;
    }
};
static thread_local Workspace workspace;

// Hands out pieces of the workspace; with a null base it only counts.
struct Carver {
    char* base;
    size_t used = 0;
    template <class T> T* take(int64_t count) {
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
};

inline Scratch carve(Carver& c, int64_t n, int64_t batch) {
    Scratch s;
    s.x = c.take<float>(batch * n);
    s.value = c.take<float>(n);
    s.score = c.take<float>(n);
    s.factors = c.take<float>(batch * n);
    s.acc = c.take<float>(ACCUMULATORS);
    s.rows = c.take<int32_t>(n);
    s.marks = c.take<uint16_t>(n);
    s.counts = c.take<uint32_t>(2048 + n);
    return s;
}

// Buffers for `threads` threads, and two more of `extra` floats.
inline bool prepare(int64_t n, int64_t batch, int threads, int64_t extra, Scratch* scratch, float** first, float** second) {
    Carver count{nullptr};
    for (int pass = 0; pass < 2; pass++) {
        Carver& c = count;
        if (pass == 1) {
            char* base = workspace.reserve(count.used);
            if (!base) return false;
            count = Carver{base};
        }
        for (int i = 0; i < threads; i++) scratch[i] = carve(c, n, batch);
        *first = c.take<float>(extra);
        *second = c.take<float>(extra);
    }
    return true;
}

}  // namespace
