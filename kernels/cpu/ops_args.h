// Arguments of the operators, and the buffers they work in.
#pragma once
#include "types.h"

constexpr int MAX_BATCH = 16;
constexpr int KEYS_MORE = 64;  // choose.h reads keys in whole vectors
constexpr int ROWS_AHEAD = 160;  // rows of the next stripe that are fetched while one is read (stripes.h)
constexpr int ROWS_MORE = 16;  // and writes indices and values in whole vectors

// Parts into which the rows of a matrix are divided, whatever the number of threads or tokens: the order of a sum must not
// depend on them (shares.h). Fewer where rows are long, since the parts' sums have to be added up.
constexpr int SHARES = 8, FEW_SHARES = 4;
constexpr int64_t NARROW = 2048;        // bytes of a row, pieces of which are too short to be read one by one
constexpr int64_t SHARED_SUMS = 32768;  // outputs, times tokens, up to which the parts' sums fit the second-level cache

static inline int shares_in(const Weight& w) {
    const int64_t bits[] = {32, 16, 8, 4};
    return w.padded * bits[w.format] <= 8 * NARROW ? SHARES : FEW_SHARES;
}

// Whether threads divide the rows, and read them whole, or the outputs. Parts that do not divide evenly among the threads
// leave some of them waiting, which is worth it for narrow matrices only.
static inline bool by_rows(const Weight& w, int tokens, int threads) {
    const int shares = shares_in(w);
    return w.padded * tokens <= SHARED_SUMS && (shares == SHARES || shares % threads == 0);
}

// One thread's buffers. n: the widest input of the call.
struct Scratch {
    float* x;         // [batch, n]
    float* value;     // [n]
    float* score;     // [n]
    float* factors;   // [n, batch], and ROWS_MORE
    float* acc;       // [2, batch, block_of(batch)]
    int32_t* rows;    // [n + ROWS_MORE + ROWS_AHEAD]
    uint16_t* marks;  // [n]
    uint32_t* keys;   // [n + KEYS_MORE]
    int32_t* next_rows;   // as `rows` and `factors`, for another stripe; null where there are no stripes
    float* next_factors;
};

struct InputSparse {
    const Weight* weight;
    const Select* select;
    Vectors x, y;
    const float* bias;
    int32_t share;
    int64_t* read;  // weights read, added up over threads (may be null)
    float* partial; // [shares, batch, padded] where the rows are divided (shares.h)
    Scratch* scratch;
};

struct Striped {
    const Stripe* stripes;  // in the order of their outputs
    int64_t count;
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
    const Weight *gate, *up, *down;  // gate: null where its outputs are given
    Vectors given;                   // act(W_gate x), then
    const float *gate_bias, *up_bias, *down_bias;
    Select select;
    int32_t activation, share;
    Vectors x, y;
    float *g, *h;   // [batch, neurons], [neurons, batch]
    float* partial; // [shares, batch, padded] where the rows of `down` are divided (shares.h)
    int64_t* kept;  // neurons read (may be null)
    Scratch* scratch;
};

// x without what the rule drops, which must be k of every `group`. back: the shift is added again to every entry.
struct NmSelect {
    Select select;
    Vectors x, y;
    int64_t width;
    int32_t back;
    uint8_t* bits;  // [batch, (width + 7) / 8], bit i % 8 of byte i / 8 for entry i (may be null)
    Scratch* scratch;
};
