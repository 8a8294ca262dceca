// What Python hands over, by pointer. Kept in step with sparsity_lib/ops/library.py.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum Format : int32_t { FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_I8 = 2, FORMAT_I4 = 3 };
enum Activation : int32_t { ACT_NONE = 0, ACT_SILU = 1, ACT_GELU_TANH = 2, ACT_GELU = 3, ACT_RELU = 4 };
enum Share : int32_t { SHARE_OWN = 0, SHARE_UNION = 1 };
enum Repair : int32_t { REPAIR_NONE = 0, REPAIR_VARIANCE = 1 };
enum Law : int32_t { LAW_NONE = 0, LAW_NORMAL = 1, LAW_HALF_NORMAL = 2 };

// A matrix [rows, cols], cols contiguous and padded with zeros to whole 64-byte lines.
//   rows = outputs, cols = inputs: rows can be skipped (gate and up projections)
//   rows = inputs, cols = outputs: inputs can be skipped (down projection, any linear layer)
// From a row to the next: `stride` entries, at least `padded`; more where two matrices take turns, row by row.
// int8: one scale an output. int4: one bfloat16 scale for `group` entries along a row; see formats.h.
struct Weight {
    const void* data;
    const void* scales;
    int64_t rows;
    int64_t cols;
    int64_t padded;
    int64_t stride;
    int32_t format;
    int32_t group;
    int64_t rounded;  // int4: whether products may be rounded to 16 bits (int4.h), as is fine where x itself has 8
};

// Keep entry i where |x_i - shift_i| * scale_i is not <= threshold (so NaN is kept), or is among the k largest.
// threshold_each: one threshold an entry instead (null: the scalar). group: the k largest of every `group` consecutive
// entries (0: of all). repair: what is kept is then multiplied by one number, see variance.h.
// law: the threshold is in units of the scores' own moments: mean + threshold * standard deviation (normal), or
// threshold * root mean square (half normal). with_sign: (x_i - shift_i) * scale_i in its place, for thresholds only.
struct Select {
    const float* shift;
    const float* scale;
    const float* threshold_each;
    float threshold;
    int32_t by_rank;
    int64_t k;
    int32_t group;
    int32_t repair;
    int32_t law;
    int32_t with_sign;
};

// Outputs that share a rule of their own (granular sparsity): W^T [inputs, outputs of the stripe], and which output is its first.
struct Stripe {
    Weight weight;
    Select select;
    int64_t first;
};

// A batch of vectors: float32 or bfloat16 (Format), `stride` entries apart.
struct Vectors {
    void* data;
    int64_t stride;
    int32_t format;
    int32_t batch;
};
