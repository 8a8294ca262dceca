"""The operators as torch knows them: torch.ops.sparsity.*, with fake kernels, so that torch.compile keeps its graph whole."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsity_lib.errors import refuse
from sparsity_lib.ops import gpu, library, reference
from sparsity_lib.ops.packed import FORMATS, Packed
from sparsity_lib.ops.reference import BATCH

_NAMES = {number: name for name, number in reference.ACTIVATIONS.items()}

_registry = torch.library.Library("sparsity", "DEF")
_WEIGHT = "Tensor {0}, Tensor? {0}_scales, int[] {0}_shape"
_registry.define(
    f"input_sparse(Tensor x, {_WEIGHT.format('weight')}, str format, int group, Tensor? shift, Tensor? scale, "
    "Tensor? thresholds, float threshold, int k, int stripe_width, Tensor? bias, bool union) -> Tensor"
)
_registry.define(f"linear(Tensor x, {_WEIGHT.format('weight')}, str format, int group, Tensor? bias) -> Tensor")
_registry.define(
    f"glu(Tensor x, {_WEIGHT.format('gate')}, {_WEIGHT.format('up')}, {_WEIGHT.format('down')}, str format, int group, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, Tensor? saliency, float threshold, int k, int activation, "
    "bool union) -> Tensor"
)


def _packed(data: Tensor, scales: Tensor | None, shape: Sequence[int], format: str, group: int, skip: str) -> Packed:
    rows, cols, padded = shape
    _, line, bits = FORMATS[format]
    scales_needed = {"int8": cols if skip == "inputs" else rows, "int4": rows * padded // group}.get(format, 0)
    whole = padded % line == 0 and cols <= padded < cols + line and data.nbytes == rows * padded * bits // 8
    if not (whole and data.is_contiguous() and (0 if scales is None else scales.numel()) == scales_needed):
        raise refuse("packed weight", f"{tuple(data.shape)} for {rows} x {cols}", "what ops.pack returns")
    return Packed(data, scales, rows, cols, padded, format, group, skip)


def _native(x: Tensor, packed: Packed) -> ctypes.CDLL | None:
    """The C++ library, if these are tensors that it knows."""
    known = x.dtype in library.FLOATS and FORMATS[packed.format][0] is not None
    return library.load() if x.device.type == "cpu" and known else None


def _input_sparse(x, weight, weight_scales, weight_shape, format, group, shift, scale, thresholds, threshold, k, stripe_width,
                  bias, union):
    packed = _packed(weight, weight_scales, weight_shape, format, group, "inputs")
    on_gpu = gpu.load(x.device.type)
    native = _native(x, packed) if on_gpu is None else None
    if native is None:
        rule = threshold if thresholds is None else thresholds
        with torch.cuda.device_of(x):
            return (on_gpu or reference).input_sparse(
                x, packed, threshold=None if k >= 0 else rule, k=k if k >= 0 else None, shift=shift, scale=scale,
                stripe_width=stripe_width or None, bias=bias, union=union)
    stripes = len(thresholds) if stripe_width else 1
    rules = (library.Select * stripes)()
    for i, rule in enumerate(rules):
        rule.shift, rule.scale = library.address(shift), library.address(scale)
        if thresholds is not None:
            rule.threshold_each = thresholds.data_ptr() + (4 * i * packed.rows if stripe_width else 0)
        rule.threshold, rule.by_rank, rule.k = threshold, int(k >= 0), max(k, 0)
    y = x.new_empty(len(x), packed.cols)
    structure, one = library.weight_of(packed), ctypes.byref
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)
        status = native.sparsity_input_sparse(
            one(structure), rules, ctypes.c_int64(stripes), ctypes.c_int64(stripe_width), one(library.vectors_of(x[part])),
            one(library.vectors_of(y[part])), ctypes.c_void_p(library.address(bias)), int(union), None, torch.get_num_threads())
        library.check(status, "input_sparse")
    return y


def _linear(x, weight, weight_scales, weight_shape, format, group, bias):
    packed = _packed(weight, weight_scales, weight_shape, format, group, "outputs")
    on_gpu = gpu.load(x.device.type)
    native = _native(x, packed) if on_gpu is None else None
    if native is None:
        with torch.cuda.device_of(x):
            return (on_gpu or reference).linear(x, packed, bias)
    y = x.new_empty(len(x), packed.rows)
    structure, one = library.weight_of(packed), ctypes.byref
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)
        status = native.sparsity_dense(
            one(structure), one(library.vectors_of(x[part])), one(library.vectors_of(y[part])),
            ctypes.c_void_p(library.address(bias)), torch.get_num_threads())
        library.check(status, "linear")
    return y


def _glu(x, gate, gate_scales, gate_shape, up, up_scales, up_shape, down, down_scales, down_shape, format, group, gate_bias,
         up_bias, down_bias, saliency, threshold, k, activation, union):
    gates = _packed(gate, gate_scales, gate_shape, format, group, "outputs")
    ups = _packed(up, up_scales, up_shape, format, group, "outputs")
    downs = _packed(down, down_scales, down_shape, format, group, "inputs")
    on_gpu = gpu.load(x.device.type)
    native = _native(x, gates) if on_gpu is None else None
    if native is None:
        with torch.cuda.device_of(x):
            return (on_gpu or reference).glu(
                x, gates, ups, downs, activation=_NAMES[activation], threshold=None if k >= 0 else threshold,
                k=k if k >= 0 else None, saliency=saliency, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias,
                union=union)
    rule = library.Select(None, library.address(saliency), None, threshold, int(k >= 0), max(k, 0))
    y = x.new_empty(len(x), downs.cols)
    weights = [library.weight_of(p) for p in (gates, ups, downs)]
    one = ctypes.byref
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)
        status = native.sparsity_glu(
            *map(one, weights), *(ctypes.c_void_p(library.address(b)) for b in (gate_bias, up_bias, down_bias)), one(rule),
            activation, int(union), one(library.vectors_of(x[part])), one(library.vectors_of(y[part])), None,
            torch.get_num_threads())
        library.check(status, "glu")
    return y


for _name, _run in (("input_sparse", _input_sparse), ("linear", _linear), ("glu", _glu)):
    for _device in ("CPU", "CUDA"):
        _registry.impl(_name, _run, _device)


@torch.library.register_fake("sparsity::input_sparse", lib=_registry)
def _(x, weight, weight_scales, weight_shape, *rest):
    return x.new_empty(x.shape[0], weight_shape[1])


@torch.library.register_fake("sparsity::linear", lib=_registry)
def _(x, weight, weight_scales, weight_shape, *rest):
    return x.new_empty(x.shape[0], weight_shape[0])


@torch.library.register_fake("sparsity::glu", lib=_registry)
def _(x, gate, gate_scales, gate_shape, up, up_scales, up_shape, down, down_scales, down_shape, *rest):
    return x.new_empty(x.shape[0], down_shape[1])
