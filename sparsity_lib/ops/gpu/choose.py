"""Which entries are kept: by threshold inside the product, or exactly k by a small kernel before it.

Top-k is told as a border and a last index for each token: kept are the keys above the border, and those equal to it up to
that index. A key holds a score's bits, so that its order is the scores' order; every NaN has the highest one.
"""

import triton
import triton.language as tl

#: What `kept` goes by: one threshold, one an entry, or the border of the k largest.
SCALAR = tl.constexpr(0)
EACH = tl.constexpr(1)
RANK = tl.constexpr(2)


@triton.jit
def rank_key(score):
    """int32 keys in the order of scores, which must be at least 0."""
    key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(score != score, 0x7FFFFFFF, key)


@triton.jit
def load_scores(x, shift, scale, token, valid, index, width):
    """x - shift and |x - shift| * scale, float32 [tokens, entries], of x [tokens, width]."""
    inside = index < width
    place = token.to(tl.int64)[:, None] * width + index[None, :]
    value = tl.load(x + place, mask=valid[:, None] & inside[None, :], other=0).to(tl.float32)
    if shift is not None:
        value = value - tl.load(shift + index, mask=inside, other=0)[None, :]
    score = tl.abs(value)
    if scale is not None:
        score = score * tl.load(scale + index, mask=inside, other=0)[None, :]
    return value, score


@triton.jit
def keep_mask(score, threshold, thresholds, border, last, token, valid, index, width, RULE: tl.constexpr, UNION: tl.constexpr):
    """What each token keeps, bool [tokens, entries], and what any does, [entries].

    thresholds: [width]; border, last: [tokens]. UNION: every token keeps what any does. NaN is kept by every rule.
    """
    if RULE == RANK:
        highest = tl.load(border + token, mask=valid, other=0)[:, None]
        until = tl.load(last + token, mask=valid, other=0)[:, None]
        key = rank_key(score)
        mask = (key > highest) | ((key == highest) & (index[None, :] <= until))
    elif RULE == EACH:
        mask = (score <= tl.load(thresholds + index, mask=index < width, other=0)[None, :]) == 0
    else:
        mask = (score <= threshold) == 0
    mask = mask & valid[:, None] & (index < width)[None, :]
    if mask.shape[0] == 1:  # the general way would cross the threads
        any = tl.reshape(mask, [mask.shape[1]])
    else:
        any = tl.max(mask.to(tl.int32), axis=0) > 0
    if UNION:
        mask = any[None, :] & valid[:, None]
    return mask, any


@triton.jit
def border_kernel(x, shift, scale, border, last, width, k, BLOCK: tl.constexpr):
    """For one token: the k-th largest key, and the index of the last entry that is kept among those equal to it."""
    token = tl.program_id(0) + tl.zeros([1], tl.int32)
    index = tl.arange(0, BLOCK)
    _, score = load_scores(x, shift, scale, token, token >= 0, index, width)
    key = tl.where(index < width, tl.reshape(rank_key(score), [BLOCK]), -1)
    found = 0
    for step in range(15):  # bits 30 and 29, then 28 and 27, down to 2 and 1: three counts of 21 bits in one sum
        unit = 1 << (29 - 2 * step)
        counts = (key >= found + unit).to(tl.int64) + ((key >= found + 2 * unit).to(tl.int64) << 21)
        total = tl.sum(counts + ((key >= found + 3 * unit).to(tl.int64) << 42), axis=0)
        reached = ((total & 0x1FFFFF) >= k).to(tl.int32) + (((total >> 21) & 0x1FFFFF) >= k).to(tl.int32)
        found += unit * (reached + ((total >> 42) >= k).to(tl.int32))
    found = found + (tl.sum((key >= found + 1).to(tl.int32), axis=0) >= k).to(tl.int32)
    wanted = k - tl.sum((key > found).to(tl.int32), axis=0)
    tied = (key == found).to(tl.int32)
    rank = tl.cumsum(tied, axis=0)
    until = tl.max(tl.where((tied > 0) & (rank <= wanted), index, -1), axis=0)
    tl.store(border + tl.program_id(0), found)
    tl.store(last + tl.program_id(0), until)
