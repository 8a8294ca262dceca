"""Products with W^T [in, out]: the rows of kept inputs are added up, those that no token of a batch keeps are not read."""

import triton
import triton.language as tl

from sparsity_lib.ops.gpu.choose import keep_mask, load_scores
from sparsity_lib.ops.gpu.formats import load_tile


@triton.jit
def finish(sums, scales, bias, col, inside, GROUP: tl.constexpr):
    """Sums [.., outputs] of one product, times int8's scales, plus the bias."""
    if scales is not None and GROUP == 0:
        sums = sums * tl.load(scales + col, mask=inside, other=0)[None, :]
    if bias is not None:
        sums = sums + tl.load(bias + col, mask=inside, other=0)[None, :]
    return sums


@triton.jit
def columns_kernel(
    x, values, data, scales, bias, shift, scale, thresholds, border, last, out,
    tokens, rows, cols, padded, threshold, steps,
    STRIPE: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, UNION: tl.constexpr, NATIVE: tl.constexpr, SPLIT: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Programs (block of outputs, split, batch). A split takes `steps` blocks of ROWS inputs.

    STRIPE > 0: the outputs of a stripe, which follow its own row of `thresholds` and whose weights lie together.

    out: y [tokens, cols], or with SPLIT float32 partial sums [splits, tokens, cols]. values: what is multiplied, float32
    [tokens, rows], where it is not x - shift. NATIVE: x has the weight's 16-bit dtype and no shift: the tensor cores'
    products are exact.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    start, end = 0, cols  # of the outputs that share a rule
    if STRIPE > 0:
        each = tl.cdiv(STRIPE, COLS)
        start, end = block // each * STRIPE, tl.minimum((block // each + 1) * STRIPE, cols)
        number = (block // each).to(tl.int64)
        thresholds += number * rows
        if GROUP > 0:
            data += number * rows * padded // 8
            scales += number * rows * padded // GROUP
        else:
            data += number * rows * padded
        block = block % each
    col0 = block * COLS  # within the stripe
    token = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    valid = token < tokens
    sums = tl.zeros([ROWS if BATCH == 1 else BATCH, COLS], tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        row = step * ROWS + tl.arange(0, ROWS)
        value, score = load_scores(x, shift, scale, token, valid, row, rows)
        mask, any = keep_mask(score, threshold, thresholds, border, last, token, valid, row, rows, RULE, UNION)
        if values is not None:
            place = token.to(tl.int64)[:, None] * rows + row[None, :]
            value = tl.load(values + place, mask=mask, other=0)
        value = tl.where(mask, value, 0.0)
        tile = load_tile(data, scales, row, any, col0, padded, GROUP, ROWS, COLS)
        if BATCH == 1:
            sums += tl.reshape(value, [ROWS])[:, None] * tile.to(tl.float32)
        elif NATIVE:
            sums = tl.dot(value.to(x.dtype.element_ty), tile.to(x.dtype.element_ty), sums)
        else:
            sums = tl.dot(value, tile.to(tl.float32), sums, input_precision="ieee")
    if BATCH == 1:
        sums = tl.sum(sums, axis=0)[None, :]
    col = start + col0 + tl.arange(0, COLS)
    here = valid[:, None] & (col < end)[None, :]
    place = token.to(tl.int64)[:, None] * cols + col[None, :]
    if SPLIT:
        tl.store(out + split.to(tl.int64) * tokens * cols + place, sums, mask=here)
    else:
        found = finish(sums, scales, bias, col, col < end, GROUP)
        tl.store(out + place, found.to(out.dtype.element_ty), mask=here)


@triton.jit
def reduce_kernel(
    partial, scales, bias, out, splits, total, cols, GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Partial sums [splits, total] added in one fixed order, finished, into out [total]; total: tokens * cols."""
    place, split = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SPLITS)
    inside = place < total
    parts = tl.load(partial + split.to(tl.int64)[:, None] * total + place[None, :],
                    mask=(split < splits)[:, None] & inside[None, :], other=0)
    found = finish(tl.sum(parts, axis=0)[None, :], scales, bias, place % cols, inside, GROUP)
    tl.store(out + place[None, :], found.to(out.dtype.element_ty), mask=inside[None, :])
