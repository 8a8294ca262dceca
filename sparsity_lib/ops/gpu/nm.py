"""N:M pruning in one kernel: score, exactly n of every M channels, the repair, the mask as bits."""

import triton
import triton.language as tl

from sparsity_lib.ops.gpu.choose import load_scores, rank_key


@triton.jit
def keep_groups(key, n, BLOCK: tl.constexpr, M: tl.constexpr):
    """The n largest of every M keys [BLOCK], ties to the lower index; keys below 0 are nobody's.

    As `choose.border_kernel` does for a whole token: the n-th largest key of each group bit by bit, then its ties in order.
    """
    key = tl.reshape(key, [BLOCK // M, M])
    found = tl.zeros([BLOCK // M], tl.int32)
    for step in range(15):  # bits 30 and 29, then 28 and 27, down to 2 and 1: three counts of 10 bits in one sum
        unit = 1 << (29 - 2 * step)
        counts = (key >= (found + unit)[:, None]).to(tl.int32) + ((key >= (found + 2 * unit)[:, None]).to(tl.int32) << 10)
        total = tl.sum(counts + ((key >= (found + 3 * unit)[:, None]).to(tl.int32) << 20), axis=1)
        reached = ((total & 0x3FF) >= n).to(tl.int32) + (((total >> 10) & 0x3FF) >= n).to(tl.int32)
        found += unit * (reached + ((total >> 20) >= n).to(tl.int32))
    found += (tl.sum((key >= (found + 1)[:, None]).to(tl.int32), axis=1) >= n).to(tl.int32)
    above, tied = key > found[:, None], key == found[:, None]
    wanted = n - tl.sum(above.to(tl.int32), axis=1)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= wanted[:, None]))
    return tl.reshape(kept.to(tl.int32), [BLOCK]) > 0


@triton.jit
def variance(value, inside, width):
    """width times the variance of the entries inside."""
    mean = tl.sum(value, axis=0) / width
    return tl.sum(tl.where(inside, (value - mean) * (value - mean), 0.0), axis=0)


@triton.jit
def nm_kernel(
    x, shift, scale, out, bits, marks, width, n,
    BACK: tl.constexpr, REPAIR: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    """Programs (token, block of channels); a repair needs the whole token in one block.

    out [tokens, width]: reference.nm_select. bits: uint8 [tokens, (width + 7) / 8]. marks: float32 [tokens, width], 1 where kept.
    """
    token = tl.program_id(0) + tl.zeros([1], tl.int32)
    start = tl.program_id(1) * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < width
    value, score = load_scores(x, shift, scale, token, token >= 0, index, width)
    value = tl.reshape(value, [BLOCK])
    kept = keep_groups(tl.where(inside, tl.reshape(rank_key(score), [BLOCK]), -1), n, BLOCK, M)
    place = tl.program_id(0).to(tl.int64) * width + index
    found = tl.where(kept, value, 0.0)
    if REPAIR:
        top = tl.max(tl.abs(value), axis=0)
        unit = tl.where(top > 0, top, 1.0)  # squares of what a float holds need not fit one
        of_all, of_kept = variance(value / unit, inside, width), variance(found / unit, inside, width)
        factor = tl.where(of_kept == 0, 1.0, tl.sqrt(of_all / of_kept))
        found = tl.where(found == 0, 0.0, found * factor)
    if BACK:
        center = tl.load(shift + index, mask=inside, other=0)
        if REPAIR:
            found = found + center
        else:
            found = tl.where(kept, tl.load(x + place, mask=inside, other=0).to(tl.float32), center)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)
    if marks is not None:
        tl.store(marks + place, kept.to(tl.float32), mask=inside)
    if bits is not None:
        wide = (width + 7) // 8
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        eight = tl.reshape((kept & inside).to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
        tl.store(bits + tl.program_id(0).to(tl.int64) * wide + byte, tl.sum(eight, axis=1).to(tl.uint8), mask=byte < wide)
