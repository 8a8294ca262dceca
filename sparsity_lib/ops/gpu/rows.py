"""Products with W [out, in]: one sum of products an output, for linear layers and the neurons of a gated FFN."""

import triton
import triton.language as tl

from sparsity_lib.ops.gpu.choose import keep_mask
from sparsity_lib.ops.gpu.formats import load_tile


@triton.jit
def products(
    x, data, scales, token, valid, row, live, rows, cols, padded, bias,
    GROUP: tl.constexpr, NATIVE: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """W x + bias for the live ones among ROWS outputs, float32 [BATCH, ROWS]; the other rows are not read."""
    sums = tl.zeros([ROWS, COLS if BATCH == 1 else BATCH], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        place = token.to(tl.int64)[None, :] * cols + col[:, None]
        value = tl.load(x + place, mask=valid[None, :] & (col < cols)[:, None], other=0)
        tile = load_tile(data, scales, row, live, start, padded, GROUP, ROWS, COLS)
        if BATCH == 1:
            sums += tile.to(tl.float32) * tl.reshape(value, [COLS])[None, :].to(tl.float32)
        elif NATIVE:
            sums = tl.dot(tile.to(x.dtype.element_ty), value, sums)
        else:
            sums = tl.dot(tile.to(tl.float32), value.to(tl.float32), sums, input_precision="ieee")
    if BATCH == 1:
        sums = tl.sum(sums, axis=1)[None, :]
    else:
        sums = tl.trans(sums)
    if scales is not None and GROUP == 0:
        sums = sums * tl.load(scales + row, mask=live, other=0)[None, :]
    if bias is not None:
        sums = sums + tl.load(bias + row, mask=live, other=0)[None, :]
    return sums


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation functions of reference.ACTIVATIONS, by number; NaN stays NaN."""
    if ACTIVATION == 1:
        return x / (1 + tl.exp(-x))
    elif ACTIVATION == 2:  # 0.5 (1 + tanh u) is 1 / (1 + exp(-2 u)), without the cancellation
        return x / (1 + tl.exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 3:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 4:
        return tl.where(x < 0, 0.0, x)
    else:
        return x


@triton.jit
def linear_kernel(
    x, data, scales, bias, out, tokens, rows, cols, padded,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, NATIVE: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """out [tokens, rows] = act(W x + bias). Programs (block of outputs, batch)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    valid = token < tokens
    sums = products(x, data, scales, token, valid, row, row < rows, rows, cols, padded, bias, GROUP, NATIVE, BATCH, ROWS, COLS)
    place = token.to(tl.int64)[:, None] * rows + row[None, :]
    found = activate(sums, ACTIVATION)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=valid[:, None] & (row < rows)[None, :])


@triton.jit
def up_kernel(
    x, gate, gate_scales, gate_bias, up, up_scales, up_bias, saliency, thresholds, border, last, g, h,
    tokens, rows, cols, padded, threshold,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, UNION: tl.constexpr,
    NATIVE: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """h = g (W_up x) for a block of neurons and a batch, where some token keeps them. g, h: float32 [tokens, rows].

    GATE: the gate's product comes first, in the same program, and g is written: a threshold needs no other neuron. Without,
    g is read, as top-k has to see all of it first.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    valid = token < tokens
    place = token.to(tl.int64)[:, None] * rows + row[None, :]
    here = valid[:, None] & (row < rows)[None, :]
    if GATE:
        gated = activate(products(x, gate, gate_scales, token, valid, row, row < rows, rows, cols, padded, gate_bias,
                                  GROUP, NATIVE, BATCH, ROWS, COLS), ACTIVATION)
        tl.store(g + place, gated, mask=here)
    else:
        gated = tl.load(g + place, mask=here, other=0)
    score = tl.abs(gated)
    if saliency is not None:
        score = score * tl.load(saliency + row, mask=row < rows, other=0)[None, :]
    _, any = keep_mask(score, threshold, thresholds, border, last, token, valid, row, rows, RULE, UNION)
    grown = products(x, up, up_scales, token, valid, row, any, rows, cols, padded, up_bias, GROUP, NATIVE, BATCH, ROWS, COLS)
    tl.store(h + place, gated * grown, mask=here)  # the down product leaves out what a token drops
