"""Training the granular product of CWIC in Triton: forward and backward, with masks computed again wherever they are needed.

What is computed, and what the gradients are, is said in `sparsity_lib.cwic.granular`; these kernels do it for all stripes in
one launch each, and keep nothing that has as many entries as tokens, stripes and inputs together. Sums are float32, in an
order that no run changes: nothing is added atomically.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Programs that sums over stripes or tokens are cut into at least, and the partial sums of an entry at most.
PROGRAMS, SPLITS = 512, 16
#: Dtypes that the kernels know.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: K(0) of the kernel functions. They stand to the right of tensors: on the left they would hide them from the interpreter.
TRIANGLE, GAUSSIAN, BIWEIGHT = (tl.constexpr(each) for each in (2**0.5, math.sqrt(6 / math.pi), 15 / 16 * math.sqrt(12 / 7)))


def forward(x: Tensor, w: Tensor, limits: Tensor, mean: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """y [tokens, out] in w's dtype and the cost, float32 [tokens], of x [tokens, in] and w [out, in].

    limits: theta s, float32 [stripes, in].
    """
    x, w = x.contiguous(), w.contiguous()
    (tokens, inputs), outputs, stripes = x.shape, len(w), len(limits)
    y, wide = torch.empty(tokens, outputs, dtype=w.dtype, device=x.device), _wide(w)
    cost = torch.zeros(tokens, device=x.device)
    if not tokens:
        return y, cost
    constant, (size, block, deep) = (w.float() @ mean).to(w.dtype), _blocks(w, width)
    product_kernel[(stripes * triton.cdiv(width, block), triton.cdiv(tokens, size))](
        x, w, limits, mean, constant, y, tokens, inputs, outputs, STRIPE=width, WIDE=wide, TOKENS=size, OUTS=block, INS=deep,
        num_warps=4)
    blocks = triton.cdiv(tokens, size)
    splits, each = _splits(stripes, blocks)
    partial = torch.empty(splits, tokens, device=x.device)
    cost_kernel[(blocks, splits)](
        x, limits, mean, partial, tokens, inputs, outputs, stripes, each, STRIPE=width, TOKENS=size, INS=64, num_warps=4)
    return y, partial.sum(0)


def backward(
    x: Tensor, w: Tensor, limits: Tensor, mean: Tensor, eps: Tensor, grad_y: Tensor, price: Tensor, width: int,
    straight_through: bool, kernel: str, wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (float32), of w (in its dtype), and of theta but for the factor - s / eps (float32); None where not wanted.

    grad_y: [tokens, out] in w's dtype. price: the cost's gradient, float32 [tokens]. kernel: one of `kernel_functions.KERNELS`.
    """
    x, w, grad_y, price = (each.contiguous() for each in (x, w, grad_y, price))
    (tokens, inputs), outputs, stripes = x.shape, len(w), len(limits)
    common = {"STRIPE": width, "WIDE": _wide(w), "num_warps": 4}
    size, block, deep = _blocks(w, width)
    found: list[Tensor | None] = [None, None, None]
    if wants[0]:
        found[0] = torch.zeros(x.shape, device=x.device)
        if tokens:
            grad_x_kernel[(triton.cdiv(tokens, size), triton.cdiv(inputs, deep))](
                x, w, limits, mean, eps, grad_y, price, found[0], tokens, inputs, outputs, stripes, STRAIGHT=straight_through,
                KERNEL=kernel, TOKENS=size, OUTS=block, INS=deep, **common)
    if wants[1]:
        found[1] = torch.zeros_like(w)
        if tokens:
            grad_w_kernel[(stripes * triton.cdiv(width, block), triton.cdiv(inputs, deep))](
                x, limits, mean, grad_y, found[1], tokens, inputs, outputs, TOKENS=size, OUTS=block, INS=deep, **common)
    if wants[2]:
        blocks = stripes * triton.cdiv(inputs, deep)
        splits, each = _splits(triton.cdiv(tokens, size), blocks)
        partial = torch.zeros(splits, *limits.shape, device=x.device)
        if tokens:
            grad_theta_kernel[(triton.cdiv(inputs, deep), stripes, splits)](
                x, w, limits, mean, eps, grad_y, price, partial, tokens, inputs, outputs, stripes, each, KERNEL=kernel,
                TOKENS=size, OUTS=block, INS=deep, **common)
        found[2] = partial.sum(0)
    return tuple(found)


def _wide(w: Tensor) -> bool:
    """Whether products are widened to float32 first: Triton's interpreter multiplies bfloat16's bits as if they were numbers."""
    return w.dtype == torch.bfloat16 and triton.knobs.runtime.interpret


def _blocks(w: Tensor, width: int) -> tuple[int, int, int]:
    """Tokens, outputs and inputs of a block. No block is much wider than a stripe; 16 is the least that tensor cores take."""
    narrow = w.dtype != torch.float32
    return (64 if narrow else 32), min(64 if narrow else 32, max(16, triton.next_power_of_2(width))), (64 if narrow else 32)


def _splits(pieces: int, programs: int) -> tuple[int, int]:
    """How many sums `pieces` are cut into beside so many other programs, and the pieces of each."""
    splits = max(1, min(triton.cdiv(PROGRAMS, programs), SPLITS, pieces))
    each = max(1, triton.cdiv(pieces, splits))
    return max(1, triton.cdiv(pieces, each)), each


@triton.jit
def load_values(x, mean, token, index, tokens, inputs):
    """x - m, float32 [TOKENS, INS]."""
    inside = index < inputs
    place = token.to(tl.int64)[:, None] * inputs + index[None, :]
    value = tl.load(x + place, mask=(token < tokens)[:, None] & inside[None, :], other=0).to(tl.float32)
    return value - tl.load(mean + index, mask=inside, other=0)[None, :]


@triton.jit
def load_limits(limits, stripe, index, inputs):
    """A stripe's thresholds [INS]; infinite beyond the last input, which nothing reaches."""
    return tl.load(limits + stripe * inputs + index, mask=index < inputs, other=float("inf"))


@triton.jit
def load_weights(w, out, live, index, inputs):
    """W [OUTS, INS]."""
    place = out.to(tl.int64)[:, None] * inputs + index[None, :]
    return tl.load(w + place, mask=live[:, None] & (index < inputs)[None, :], other=0)


@triton.jit
def load_gradients(grad_y, token, out, live, tokens, outputs):
    """The gradient of y [TOKENS, OUTS]."""
    place = token.to(tl.int64)[:, None] * outputs + out[None, :]
    return tl.load(grad_y + place, mask=(token < tokens)[:, None] & live[None, :], other=0)


@triton.jit
def multiply(a, b, sums, WIDE: tl.constexpr):
    """sums + a b, of two tiles of one dtype."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def near(size, limit, width, KERNEL: tl.constexpr):
    """K at (|x - m| - threshold) / width, the functions of `kernel_functions`, and 0 where width is; float32 [TOKENS, INS]."""
    if KERNEL == "rectangle":
        return ((size >= (limit - width / 2)[None, :]) & (size < (limit + width / 2)[None, :])).to(tl.float32)
    else:
        varies = (width > 0)[None, :]
        u = (size - limit[None, :]) / tl.where(varies, width[None, :], 1.0)
        if KERNEL == "triangle":
            value = tl.maximum(tl.abs(u) * -2 + TRIANGLE, 0.0)
        elif KERNEL == "gaussian":
            value = tl.exp(-6 * u * u) * GAUSSIAN
        else:
            within = tl.maximum(1 - 12 / 7 * u * u, 0.0)
            value = within * within * BIWEIGHT
        return tl.where(varies, value, 0.0)


@triton.jit
def product_kernel(
    x, w, limits, mean, constant, y, tokens, inputs, outputs,
    STRIPE: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):
    """y of one block of outputs within a stripe and one block of tokens."""
    each = tl.cdiv(STRIPE, OUTS)
    stripe = tl.program_id(0) // each
    within = tl.program_id(0) % each * OUTS + tl.arange(0, OUTS)
    out = stripe * STRIPE + within
    live = (within < STRIPE) & (out < outputs)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros([TOKENS, OUTS], tl.float32)
    for start in range(0, inputs, INS):
        index = start + tl.arange(0, INS)
        value = load_values(x, mean, token, index, tokens, inputs)
        kept = tl.abs(value) >= load_limits(limits, stripe, index, inputs)[None, :]
        value = tl.where(kept, value, 0.0).to(w.dtype.element_ty)
        sums = multiply(value, tl.trans(load_weights(w, out, live, index, inputs)), sums, WIDE)
    sums += tl.load(constant + out, mask=live, other=0).to(tl.float32)[None, :]
    place = token.to(tl.int64)[:, None] * outputs + out[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & live[None, :])


@triton.jit
def cost_kernel(
    x, limits, mean, partial, tokens, inputs, outputs, stripes, each,
    STRIPE: tl.constexpr, TOKENS: tl.constexpr, INS: tl.constexpr,
):
    """Weights that `each` stripes read for one block of tokens: partial [splits, tokens]."""
    token, split = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    total = tl.zeros([TOKENS], tl.float32)
    for stripe in range(split * each, tl.minimum((split + 1) * each, stripes)):
        count = tl.zeros([TOKENS], tl.int32)
        for start in range(0, inputs, INS):
            index = start + tl.arange(0, INS)
            size = tl.abs(load_values(x, mean, token, index, tokens, inputs))
            count += tl.sum((size >= load_limits(limits, stripe, index, inputs)[None, :]).to(tl.int32), axis=1)
        total += count.to(tl.float32) * tl.minimum(STRIPE, outputs - stripe * STRIPE).to(tl.float32)
    tl.store(partial + split.to(tl.int64) * tokens + token, total, mask=token < tokens)


@triton.jit
def back_product(
    grad_y, w, token, stripe, index, tokens, inputs, outputs, STRIPE: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):
    """The gradient of y through the weights of one stripe, as if nothing were masked: float32 [TOKENS, INS]."""
    back = tl.zeros([TOKENS, INS], tl.float32)
    for start in range(0, STRIPE, OUTS):
        within = start + tl.arange(0, OUTS)
        out = stripe * STRIPE + within
        live = (within < STRIPE) & (out < outputs)
        back = multiply(load_gradients(grad_y, token, out, live, tokens, outputs), load_weights(w, out, live, index, inputs),
                        back, WIDE)
    return back


@triton.jit
def grad_x_kernel(
    x, w, limits, mean, eps, grad_y, price, grad_x, tokens, inputs, outputs, stripes, STRAIGHT: tl.constexpr,
    KERNEL: tl.constexpr, STRIPE: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):
    """The gradient of one block of tokens and inputs, of all stripes in turn."""
    token, index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * INS + tl.arange(0, INS)
    inside = index < inputs
    value = load_values(x, mean, token, index, tokens, inputs)
    size, width = tl.abs(value), tl.load(eps + index, mask=inside, other=0)
    sums, hits = tl.zeros([TOKENS, INS], tl.float32), tl.zeros([TOKENS, INS], tl.float32)
    for stripe in range(stripes):
        limit = load_limits(limits, stripe, index, inputs)
        back = back_product(grad_y, w, token, stripe, index, tokens, inputs, outputs, STRIPE, WIDE, TOKENS, OUTS, INS)
        if STRAIGHT:
            sums += back
        else:
            sums += tl.where(size >= limit[None, :], back, 0.0)
        hits += near(size, limit, width, KERNEL) * tl.minimum(STRIPE, outputs - stripe * STRIPE).to(tl.float32)
    paid = tl.load(price + token, mask=token < tokens, other=0)[:, None]
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    sums += tl.where(hits > 0, hits * sign * paid / width[None, :], 0.0)
    place = token.to(tl.int64)[:, None] * inputs + index[None, :]
    tl.store(grad_x + place, sums, mask=(token < tokens)[:, None] & inside[None, :])


@triton.jit
def grad_w_kernel(
    x, limits, mean, grad_y, grad_w, tokens, inputs, outputs,
    STRIPE: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):
    """The gradient of one block of weights, of all tokens."""
    each = tl.cdiv(STRIPE, OUTS)
    stripe = tl.program_id(0) // each
    within = tl.program_id(0) % each * OUTS + tl.arange(0, OUTS)
    out, index = stripe * STRIPE + within, tl.program_id(1) * INS + tl.arange(0, INS)
    live, inside = (within < STRIPE) & (out < outputs), index < inputs
    limit, center = load_limits(limits, stripe, index, inputs), tl.load(mean + index, mask=inside, other=0)
    sums = tl.zeros([OUTS, INS], tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        value = load_values(x, mean, token, index, tokens, inputs)
        value = tl.where(tl.abs(value) >= limit[None, :], value, 0.0) + center[None, :]
        below = load_gradients(grad_y, token, out, live, tokens, outputs)
        sums = multiply(tl.trans(below), value.to(grad_y.dtype.element_ty), sums, WIDE)
    place = out.to(tl.int64)[:, None] * inputs + index[None, :]
    tl.store(grad_w + place, sums.to(grad_w.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def grad_theta_kernel(
    x, w, limits, mean, eps, grad_y, price, partial, tokens, inputs, outputs, stripes, each,
    KERNEL: tl.constexpr, STRIPE: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):
    """Programs (block of inputs, stripe, split of `each` blocks of tokens): sums of (back (x - m) + price outputs) K."""
    index, stripe, split = tl.program_id(0) * INS + tl.arange(0, INS), tl.program_id(1), tl.program_id(2)
    inside = index < inputs
    limit, width = load_limits(limits, stripe, index, inputs), tl.load(eps + index, mask=inside, other=0)
    own = tl.minimum(STRIPE, outputs - stripe * STRIPE).to(tl.float32)
    sums = tl.zeros([INS], tl.float32)
    for block in range(split * each, tl.minimum((split + 1) * each, tl.cdiv(tokens, TOKENS))):
        token = block * TOKENS + tl.arange(0, TOKENS)
        value = load_values(x, mean, token, index, tokens, inputs)
        back = back_product(grad_y, w, token, stripe, index, tokens, inputs, outputs, STRIPE, WIDE, TOKENS, OUTS, INS)
        paid = tl.load(price + token, mask=token < tokens, other=0)[:, None]
        sums += tl.sum((back * value + paid * own) * near(tl.abs(value), limit, width, KERNEL), axis=0)
    place = (split.to(tl.int64) * stripes + stripe) * inputs + index
    tl.store(partial + place, sums, mask=inside)
