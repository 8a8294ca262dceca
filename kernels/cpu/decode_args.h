// A decoder-only transformer as the decoding loop sees it: one token at a time, all layers in one call.
// Kept in step with sparsity_lib/decode/structures.py.
#pragma once
#include "ops_args.h"

constexpr int HEADS_TOGETHER = 4;  // heads of the same keys and values that are taken together (attention.h)
// From one of their rows of scores to the next: whole lines.
static inline int64_t scores_pitch(int64_t capacity) { return (capacity + 31) / 16 * 16; }

// What is dropped in front of a projection; without it the projection is dense, and packed by outputs.
// rotation: by outputs, Q^T; entries are dropped from Q^T x, and the projection holds W Q.
// low: by outputs, V; V x is never dropped: it comes after the inputs, and what multiplies it after their rows.
struct Site {
    Select select;
    Weight rotation, low;
    int32_t active;
    int32_t rotated;
    int32_t lowered;
};

// Stripes in front of a projection, which have its weights and rules; none where `count` is 0.
struct Stripes {
    const Stripe* first;
    int64_t count;
};

struct Layer {
    // Norm weights as multipliers (Gemma's 1 + w added up before). The two `after` and the head norms may be null.
    const float *norm_attention, *norm_after_attention, *norm_ffn, *norm_after_ffn, *norm_q, *norm_k;
    Weight qkv, o;         // qkv: q, k and v as one matrix
    Weight gate, up;       // by outputs; unused where the FFN's input is sparse
    Weight gate_up, down;  // gate_up: by inputs, one matrix, used where the FFN's input is sparse
    const float *qkv_bias, *o_bias, *gate_bias, *up_bias, *gate_up_bias, *down_bias;
    Site at_qkv, at_o, at_up, at_gate, at_down;
    Stripes stripes_qkv, stripes_o, stripes_gate;  // in place of qkv, o and gate, whose sites are then inactive
    void *keys, *values;   // [kv_heads, capacity, head_dim]
    int32_t window;        // tokens that attention looks back, this one included; 0: all
    int32_t rope;          // which table of rotations
};

struct Decoder {
    const Layer* layers;
    int64_t layer_count, hidden, heads, kv_heads, head_dim, neurons, capacity, vocabulary;
    Weight embedding, head;  // by outputs; the head by inputs where its site is active
    Stripes stripes_head;    // in place of `head`, whose site is then inactive
    Site at_head;
    // Behind an active site, logits of the `refined` words whose logits are the largest are computed again, from all inputs and
    // rows of head_rows, by outputs; a bias has no place there. 0: of none.
    Weight head_rows;
    int64_t refined;
    const float *final_norm, *head_bias;  // the bias may be null
    const float *cosine[2], *sine[2];  // [capacity, head_dim]
    float eps, scaling, embedding_scale, attention_cap, logit_cap, logit_factor;
    int32_t activation, cache_format;
};

struct DecodeStep {
    const Decoder* model;
    int64_t token, position;
    float* logits;  // [vocabulary]
    // Shared between threads.
    float *qkv, *attention, *out, *gates, *products, *ffn, *rotated, *lowered;
    float* partial[2];  // parts of products whose rows are divided (shares.h), in turn
    double* bytes;      // of weights and cache read, one sum a thread
    Scratch* scratch;
    float** residual;  // one [hidden] a thread
    float** scores;    // [HEADS_TOGETHER, scores_pitch] a thread
    float** wide;      // one [all heads] or [neurons] a thread
    // Where logits are refined: scores of all words, which of them are, scratch, and how many each thread found likely.
    float* order;
    int32_t *words, *among;
    uint32_t* keys;
    int64_t* found;
};
