// Arguments of the operators, and the buffers they work in.
#pragma once
#include "types.h"

constexpr int MAX_BATCH = 16;

// One thread's buffers. n: the widest input of the call.
struct Scratch {
    float* x;         // [batch, n]
    float* value;     // [n]
    float* score;     // [n]
    float* factors;   // [n, batch]
    float* acc;       // [batch, block_of(batch)]
    int32_t* rows;    // [n]
    uint16_t* marks;  // [n]
    uint32_t* counts; // [2048 + n]
};

struct InputSparse {
    const Weight* weight;
    const Select* select;  // [stripes]
    int64_t stripes;
    int64_t stripe_width;
    Vectors x, y;
    const float* bias;
    int32_t share;
    int64_t* read;  // weights read, added up over threads (may be null)
    Scratch* scratch;
};

struct Dense {
    const Weight* weight;
    Vectors x, y;
    const float* bias;
    Scratch* scratch;
};

struct SparseGlu {
    const Weight *gate, *up, *down;
    const float *gate_bias, *up_bias, *down_bias;
    Select select;
    int32_t activation, share;
    Vectors x, y;
    float *g, *h;   // [batch, neurons], [neurons, batch]
    int64_t* kept;  // neurons read (may be null)
    Scratch* scratch;
};
