"""The compiled operators, called with tensors that were checked before."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sparsity_lib.ops import gpu, library
from sparsity_lib.ops.packed import FORMATS, Packed
from sparsity_lib.ops.reference import BATCH


def can(x: Tensor, weight: Packed | None = None) -> bool:
    """Whether the compiled library computes this: tensors on the CPU, of dtypes that it knows, and no interpreter asked for."""
    known = x.device.type == "cpu" and x.dtype in library.FLOATS and (weight is None or FORMATS[weight.format][0] is not None)
    return known and gpu.load("cpu") is None and library.load() is not None


def input_sparse(
    x: Tensor, weight: Packed, shift: Tensor | None, scale: Tensor | None, thresholds: Tensor | None, threshold: float, k: int,
    bias: Tensor | None, union: bool, m: int = 0, repair: bool = False,
) -> Tensor:
    """x [tokens, in] -> [tokens, out]; k < 0: by threshold; thresholds: [in], or [stripes, in] of a weight in stripes.

    m: k of every m inputs (0: of all).
    """
    native, one, address = library.load(), ctypes.byref, library.address
    y = torch.empty(len(x), weight.cols, dtype=x.dtype)
    if weight.stripe:
        stripes = library.stripes_of(weight, thresholds, shift, scale, x.dtype == torch.bfloat16)
        call = functools.partial(native.sparsity_striped, stripes, len(stripes), weight.cols)
    else:
        rule = library.Select(
            address(shift), address(scale), address(thresholds), threshold, int(k >= 0), max(k, 0), m, int(repair))
        call = functools.partial(native.sparsity_input_sparse, one(library.weight_of(weight)), one(rule))
    for inputs, outputs in _batches(x, y):
        status = call(one(inputs), one(outputs), address(bias), union, None, torch.get_num_threads())
        library.check(status, "input_sparse")
    return y


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [tokens, in] -> [tokens, out], nothing skipped."""
    native, one = library.load(), ctypes.byref
    y = torch.empty(len(x), weight.rows, dtype=x.dtype)
    for inputs, outputs in _batches(x, y):
        status = native.sparsity_dense(
            one(library.weight_of(weight)), one(inputs), one(outputs), library.address(bias), torch.get_num_threads())
        library.check(status, "linear")
    return y


def glu(
    x: Tensor, gate: Packed, up: Packed, down: Packed, gate_bias: Tensor | None, up_bias: Tensor | None,
    down_bias: Tensor | None, saliency: Tensor | None, thresholds: Tensor | None, threshold: float, k: int, activation: int,
    union: bool,
) -> Tensor:
    """x [tokens, in] -> [tokens, out]; k < 0: by threshold; activation: a number of reference.ACTIVATIONS."""
    rule = library.Select(None, library.address(saliency), library.address(thresholds), threshold, int(k >= 0), max(k, 0))
    return _neurons(x, gate, None, up, down, (gate_bias, up_bias, down_bias), rule, activation, union)


def gated(
    x: Tensor, g: Tensor, up: Packed, down: Packed, up_bias: Tensor | None, down_bias: Tensor | None, saliency: Tensor | None,
    thresholds: Tensor | None, threshold: float, k: int, union: bool,
) -> Tensor:
    """`glu` where g [tokens, neurons] is known: act(W_gate x)."""
    rule = library.Select(None, library.address(saliency), library.address(thresholds), threshold, int(k >= 0), max(k, 0))
    return _neurons(x, None, g, up, down, (None, up_bias, down_bias), rule, 0, union)


def _neurons(
    x: Tensor, gate: Packed | None, g: Tensor | None, up: Packed, down: Packed, biases: tuple[Tensor | None, ...],
    rule: library.Select, activation: int, union: bool,
) -> Tensor:
    native, one = library.load(), ctypes.byref
    y = torch.empty(len(x), down.cols, dtype=x.dtype)
    whole = None if gate is None else one(library.weight_of(gate))
    others = (one(library.weight_of(up)), one(library.weight_of(down)), *map(library.address, biases), one(rule))
    batches = _batches(x, y)
    given = [None] * len(batches) if g is None else [one(each) for each, _ in _batches(g, g)]
    for (inputs, outputs), gates in zip(batches, given, strict=True):
        status = native.sparsity_glu(
            whole, gates, *others, activation, union, one(inputs), one(outputs), None,
            torch.get_num_threads())
        library.check(status, "glu")
    return y


def nm_select(
    x: Tensor, n: int, m: int, shift: Tensor | None, scale: Tensor | None, back: bool, repair: bool, bits: bool,
) -> tuple[Tensor, Tensor]:
    """x [tokens, width] -> pruned x, and the packed mask [tokens, (width + 7) / 8], or [tokens, 0] where it is not wanted."""
    native, one = library.load(), ctypes.byref
    x = x if x.stride(-1) == 1 else x.contiguous()
    rule = library.Select(library.address(shift), library.address(scale), None, 0.0, 1, n, m, int(repair))
    y = torch.empty(x.shape, dtype=x.dtype)
    mask = torch.empty(len(x), -(-x.shape[1] // 8) if bits else 0, dtype=torch.uint8)
    status = native.sparsity_nm_select(
        one(rule), x.shape[1], one(library.vectors_of(x)), one(library.vectors_of(y)), back,
        library.address(mask) if bits else None, torch.get_num_threads())
    library.check(status, "nm_select")
    return y, mask


def _batches(x: Tensor, y: Tensor) -> list[tuple[library.Vectors, library.Vectors]]:
    vectors_of = library.vectors_of
    if len(x) <= BATCH:
        return [(vectors_of(x), vectors_of(y))]
    return [(vectors_of(a), vectors_of(b)) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
