"""The operators on a GPU: which kernels run, on which grids, with which block sizes.

Every size follows from the shapes alone, nothing is tuned at run time and nothing is added atomically: the same call gives
the same bits. One token takes another way to its sums than two or more do, so it may round otherwise alone than in a batch.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache

import torch
import triton
from torch import Tensor

from sparsity_lib.errors import refuse
from sparsity_lib.ops import reference
from sparsity_lib.ops.gpu import choose, columns, nm, rows
from sparsity_lib.ops.packed import FORMATS, Packed
from sparsity_lib.ops.reference import ACTIVATIONS, BATCH

#: Programs that a product is cut into at least, if it is large enough: some for each of a large GPU's 132 processors.
PROGRAMS = 768
#: The partial sums of one output at most, and the steps of a split at least.
SPLITS, STEPS = 32, 4
#: Entries that `border_kernel` counts at most: its counts have 21 bits, its block a power of two.
WIDEST = 1 << 20
#: Channels that a program prunes, where no repair asks for whole tokens.
NM_BLOCK = 1024


def input_sparse(
    x: Tensor, weight: Packed, *, threshold: Tensor | float | None, k: int | None, shift: Tensor | None, scale: Tensor | None,
    bias: Tensor | None, union: bool, m: int = 0, repair: bool = False,
) -> Tensor:
    """reference.input_sparse for x [tokens, in] on a GPU: one launch, or two where few outputs are summed in splits.

    n of every m: one launch more, before it.
    """
    x = x.contiguous()
    out = x.new_empty(len(x), weight.outputs)
    if not len(x):
        return out
    if m:
        _columns(*_pruned(x, k, m, shift, scale, repair, union), weight, out, bias, None, None, 0.0, (None, None), union)
        return out
    marks = (None, None) if k is None else _borders(x, shift, scale, k)
    _columns(x, None, weight, out, bias, shift, scale, threshold, marks, union)
    return out


def nm_select(
    x: Tensor, n: int, m: int, *, shift: Tensor | None = None, scale: Tensor | None = None, back: bool = False,
    repair: bool = False, bits: bool = False,
) -> tuple[Tensor, Tensor]:
    """reference.nm_select for x [tokens, width] on a GPU, in one launch where m is a power of two."""
    return _nm(x, n, m, shift, scale, back, repair, bits, x.dtype, None)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """reference.linear for x [tokens, in] on a GPU."""
    return _linear(x.contiguous(), weight, bias, 0, x.dtype)


def glu(
    x: Tensor, gate: Packed, up: Packed, down: Packed, *, activation: str, threshold: Tensor | float | None, k: int | None,
    saliency: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None, union: bool,
) -> Tensor:
    """reference.glu for x [tokens, in] on a GPU.

    By threshold: gate, mask and up in one launch, then down. By rank: gate, border, mask and up, down.
    """
    x = x.contiguous()
    if not len(x):
        return x.new_empty(0, down.outputs)
    if k is None:
        g = torch.empty(len(x), gate.rows, device=x.device)
    else:
        g = _linear(x, gate, gate_bias, ACTIVATIONS[activation], torch.float32)
    return _neurons(
        x, gate if k is None else None, g, up, down, ACTIVATIONS[activation], threshold, k, saliency, gate_bias, up_bias,
        down_bias, union)


def gated(
    x: Tensor, g: Tensor, up: Packed, down: Packed, *, threshold: Tensor | float | None, k: int | None,
    saliency: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None, union: bool,
) -> Tensor:
    """reference.gated for x [tokens, in] and g [tokens, neurons] on a GPU: mask and up in one launch, then down."""
    x = x.contiguous()
    if not len(x):
        return x.new_empty(0, down.outputs)
    return _neurons(
        x, None, g.float().contiguous(), up, down, 0, threshold, k, saliency, None, up_bias, down_bias, union)


def _neurons(
    x: Tensor, gate: Packed | None, g: Tensor, up: Packed, down: Packed, activation: int, threshold: Tensor | float | None,
    k: int | None, saliency: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    union: bool,
) -> Tensor:
    """A gated FFN of x; g float32 [tokens, neurons] is filled where there is a gate, else read."""
    tokens, neurons = g.shape
    out, h = x.new_empty(tokens, down.outputs), torch.empty_like(g)
    marks = (None, None) if k is None else _borders(g, None, saliency, k)
    each = threshold if isinstance(threshold, Tensor) else None
    rule = choose.RANK if k is not None else choose.SCALAR if each is None else choose.EACH
    batch, native = _batch(tokens), _native(x, up)
    size, width, warps = _row_blocks(up, batch, native)
    weights = (None, None, None) if gate is None else (gate.data, gate.scales, gate_bias)
    rows.up_kernel[(triton.cdiv(neurons, size), triton.cdiv(tokens, batch))](
        x, *weights, up.data, up.scales, up_bias, saliency, each, *marks, g, h,
        tokens, neurons, up.cols, up.padded, _float32(None if each is not None else threshold), GATE=gate is not None,
        ACTIVATION=activation, GROUP=_group(up), RULE=rule.value, UNION=union, NATIVE=native,
        BATCH=batch, ROWS=size, COLS=width, num_warps=warps)
    _columns(g, h, down, out, down_bias, None, saliency, threshold, marks, union)
    return out


def _linear(x: Tensor, weight: Packed, bias: Tensor | None, activation: int, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(len(x), weight.rows, dtype=dtype)
    if not len(x):
        return out
    batch, native = _batch(len(x)), _native(x, weight)
    size, width, warps = _row_blocks(weight, batch, native)
    rows.linear_kernel[(triton.cdiv(weight.rows, size), triton.cdiv(len(x), batch))](
        x, weight.data, weight.scales, bias, out, len(x), weight.rows, weight.cols, weight.padded, ACTIVATION=activation,
        GROUP=_group(weight), NATIVE=native, BATCH=batch, ROWS=size, COLS=width, num_warps=warps)
    return out


def _borders(x: Tensor, shift: Tensor | None, scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Of each token: the k-th largest key, and the last index kept among those equal to it."""
    tokens, width = x.shape
    if width > WIDEST:
        raise refuse("width with k=", width, f"at most {WIDEST} entries on a GPU", "choose by threshold")
    border, last = (torch.empty(tokens, dtype=torch.int32, device=x.device) for _ in range(2))
    block = max(128, triton.next_power_of_2(width))
    choose.border_kernel[(tokens,)](
        x, shift, scale, border, last, width, k, BLOCK=block, num_warps=min(32, block // 128))
    return border, last


def _nm(
    x: Tensor, n: int, m: int, shift: Tensor | None, scale: Tensor | None, back: bool, repair: bool, bits: bool,
    dtype: torch.dtype, marks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """nm_select with a result of this dtype; marks: float32 like x, becomes 1 where an entry is kept."""
    x = x.contiguous()
    tokens, width = x.shape
    if n == m:
        n = m = 2  # all are kept, whatever the groups
    if m & (m - 1) or width > WIDEST:
        _warn(n, m)
        y, mask = reference.nm_select(x.float(), n, m, shift=shift, scale=scale, back=back, repair=repair, bits=True)
        if marks is not None:
            marks.copy_(reference.unpack_bits(mask, width))
        return y.to(dtype), mask if bits else mask[:, :0]
    found = torch.empty(tokens, width, dtype=dtype, device=x.device)
    mask = torch.empty(tokens, -(-width // 8) if bits else 0, dtype=torch.uint8, device=x.device)
    if tokens:
        block = max(128, triton.next_power_of_2(width))
        block = block if repair else min(block, NM_BLOCK)
        nm.nm_kernel[(tokens, triton.cdiv(width, block))](
            x, shift, scale, found, mask if bits else None, marks, width, n, BACK=back and shift is not None, REPAIR=repair, M=m,
            BLOCK=block, num_warps=min(32, block // 128))
    return found, mask


@cache
def _warn(n: int, m: int) -> None:
    fix = "Fix: m = 2, 4, 8, 16, 32 or 64."
    warnings.warn(f"The Triton kernel does not know the pattern {n}:{m}, plain PyTorch selects, slowly. {fix}", stacklevel=5)


def _pruned(
    x: Tensor, n: int, m: int, shift: Tensor | None, scale: Tensor | None, repair: bool, union: bool
) -> tuple[Tensor, Tensor | None]:
    """x and values for `_columns` with the threshold 0."""
    if shift is None and not repair and not union:
        return _nm(x, n, m, None, scale, False, False, False, x.dtype, None)[0], None  # kept entries of 0 add nothing
    marks = torch.empty(x.shape, device=x.device)
    values, _ = _nm(x, n, m, shift, scale, False, repair, False, torch.float32, marks)
    if union:  # a token then multiplies its own values where others marked
        values = x.float() if shift is None else x.float() - shift
    return marks, values


def _columns(
    x: Tensor, values: Tensor | None, weight: Packed, out: Tensor, bias: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, threshold: Tensor | float | None, marks: tuple[Tensor | None, Tensor | None],
    union: bool,
) -> None:
    """The product with a weight packed by skip="inputs" into `out`; x gives the scores, and the values too if there are none."""
    tokens, batch = len(x), _batch(len(x))
    native = values is None and shift is None and _native(x, weight)
    size, width, warps = _column_blocks(weight, batch, native)
    blocks, steps = weight.stripes * triton.cdiv(weight.stripe or weight.cols, width), triton.cdiv(weight.rows, size)
    batches = triton.cdiv(tokens, batch)
    splits = max(1, min(triton.cdiv(PROGRAMS, blocks * batches), SPLITS, steps // STEPS))
    each_steps = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, each_steps)
    each = threshold if isinstance(threshold, Tensor) else None
    rule = choose.RANK if marks[0] is not None else choose.SCALAR if each is None else choose.EACH
    target = out if splits == 1 else torch.empty(splits, tokens, weight.cols, device=x.device)
    columns.columns_kernel[(blocks, splits, batches)](
        x, values, weight.data, weight.scales, bias, shift, scale, each, *marks, target, tokens, weight.rows, weight.cols,
        weight.padded, _float32(None if each is not None else threshold), each_steps, STRIPE=weight.stripe, GROUP=_group(weight),
        RULE=rule.value, UNION=union, NATIVE=native, SPLIT=splits > 1, BATCH=batch, ROWS=size, COLS=width, num_warps=warps)
    if splits > 1:
        block = 64 if tokens == 1 else 256
        columns.reduce_kernel[(triton.cdiv(out.numel(), block),)](
            target, weight.scales, bias, out, splits, out.numel(), weight.cols, GROUP=_group(weight),
            SPLITS=triton.next_power_of_2(splits), BLOCK=block, num_warps=4)


def _batch(tokens: int) -> int:
    return min(BATCH, triton.next_power_of_2(tokens))


def _group(weight: Packed) -> int:
    return weight.group if weight.format == "int4" else 0


def _float32(threshold: float | None) -> float:
    """A threshold as the kernels take it: beyond float32's range it is infinite."""
    return ctypes.c_float(0.0 if threshold is None else threshold).value


def _native(x: Tensor, weight: Packed) -> bool:
    """Whether the tensor cores' 16-bit products of x and the weight are exact."""
    if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return False  # the interpreter multiplies bfloat16's bit patterns as if they were numbers
    exact = (str(x.dtype).removeprefix("torch."), "int8")
    return x.dtype != torch.float32 and weight.format in exact


def _column_blocks(weight: Packed, batch: int, native: bool) -> tuple[int, int, int]:
    """Inputs and outputs of a block, warps. No block is much wider than a stripe."""
    wide = 256 if FORMATS[weight.format][2] <= 8 and not weight.stripe else 128
    if weight.stripe and FORMATS[weight.format][2] > 8:  # of narrower formats a thread reads many entries at once
        wide = min(wide, max(16, triton.next_power_of_2(weight.stripe)))
    if batch == 1:
        return (16 if weight.format == "int4" else 32), wide, 4
    return (64 if native else 16), min(wide, 128), 4


def _row_blocks(weight: Packed, batch: int, native: bool) -> tuple[int, int, int]:
    """Outputs and inputs of a block, warps: a thread reads 16 bytes at a time."""
    if batch == 1:
        return (8 if weight.rows >= 8 * PROGRAMS else 4), 512, 4
    if native:
        return 16, 128, 4
    return 16, min(128, 1024 // FORMATS[weight.format][2]), 4
