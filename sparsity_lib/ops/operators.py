"""The operators as torch knows them: torch.ops.sparsity.*, with fake kernels, so that torch.compile keeps its graph whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sparsity_lib.ops import gpu, library, native, reference
from sparsity_lib.ops.packed import Packed

_NAMES = {number: name for name, number in reference.ACTIVATIONS.items()}

_registry = torch.library.Library("sparsity", "DEF")
_WEIGHT = "Tensor {0}, Tensor? {0}_scales, int[] {0}_shape"
_registry.define(
    f"input_sparse(Tensor x, {_WEIGHT.format('weight')}, str format, int group, Tensor? shift, Tensor? scale, "
    "Tensor? thresholds, float threshold, int k, Tensor? bias, bool union, int m=0, bool repair=False) "
    "-> Tensor"
)
_registry.define(
    "nm_select(Tensor x, int n, int m, Tensor? shift, Tensor? scale, bool back, bool repair, bool bits) -> (Tensor, Tensor)")
_registry.define(f"linear(Tensor x, {_WEIGHT.format('weight')}, str format, int group, Tensor? bias) -> Tensor")
_registry.define(
    f"glu(Tensor x, {_WEIGHT.format('gate')}, {_WEIGHT.format('up')}, {_WEIGHT.format('down')}, str format, int group, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, Tensor? saliency, Tensor? thresholds, float threshold, int k, "
    "int activation, bool union) -> Tensor"
)
_registry.define(
    f"gated(Tensor x, Tensor g, {_WEIGHT.format('up')}, {_WEIGHT.format('down')}, str format, int group, Tensor? up_bias, "
    "Tensor? down_bias, Tensor? saliency, Tensor? thresholds, float threshold, int k, bool union) -> Tensor"
)


def _packed(data: Tensor, scales: Tensor | None, shape: Sequence[int], format: str, group: int, skip: str) -> Packed:
    rows, cols, padded, *stripe = shape
    return Packed(data, scales, rows, cols, padded, format, group, skip, *stripe)


def _other(x: Tensor) -> ModuleType:
    """Who computes what the C++ library does not: Triton, or plain PyTorch."""
    return gpu.load(x.device.type) or reference


def _whole(packed: Packed) -> Packed:
    """The same weight in one piece, which Triton asks for (`packed.pair` takes rows apart, for CPUs)."""
    return packed if packed.data.is_contiguous() else replace(packed, data=packed.data.contiguous())


def _rule(thresholds: Tensor | None, threshold: float, k: int) -> Tensor | float | None:
    """What `threshold=` of the other backends is."""
    if k >= 0:
        return None
    return threshold if thresholds is None else thresholds


def _input_sparse(x, weight, weight_scales, weight_shape, format, group, shift, scale, thresholds, threshold, k, bias,
                  union, m=0, repair=False):
    packed = _packed(weight, weight_scales, weight_shape, format, group, "inputs")
    if native.can(x, packed):
        return native.input_sparse(x, packed, shift, scale, thresholds, threshold, k, bias, union, m, repair)
    with torch.cuda.device_of(x):
        return _other(x).input_sparse(
            x, _whole(packed), threshold=_rule(thresholds, threshold, k), k=k if k >= 0 else None, shift=shift, scale=scale,
            bias=bias, union=union, m=m, repair=repair)


def _nm_select(x, n, m, shift, scale, back, repair, bits):
    if native.can(x):
        return native.nm_select(x, n, m, shift, scale, back, repair, bits)
    with torch.cuda.device_of(x):
        return _other(x).nm_select(x, n, m, shift=shift, scale=scale, back=back, repair=repair, bits=bits)


def _linear(x, weight, weight_scales, weight_shape, format, group, bias):
    packed = _packed(weight, weight_scales, weight_shape, format, group, "outputs")
    if native.can(x, packed):
        return native.linear(x, packed, bias)
    with torch.cuda.device_of(x):
        return _other(x).linear(x, _whole(packed), bias)


def _glu(x, gate, gate_scales, gate_shape, up, up_scales, up_shape, down, down_scales, down_shape, format, group, gate_bias,
         up_bias, down_bias, saliency, thresholds, threshold, k, activation, union):
    gates = _packed(gate, gate_scales, gate_shape, format, group, "outputs")
    ups = _packed(up, up_scales, up_shape, format, group, "outputs")
    downs = _packed(down, down_scales, down_shape, format, group, "inputs")
    if native.can(x, gates):
        return native.glu(x, gates, ups, downs, gate_bias, up_bias, down_bias, saliency, thresholds, threshold, k,
                          activation, union)
    with torch.cuda.device_of(x):
        return _other(x).glu(
            x, gates, _whole(ups), _whole(downs), activation=_NAMES[activation], threshold=_rule(thresholds, threshold, k),
            k=k if k >= 0 else None, saliency=saliency, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias, union=union)


def _gated(x, g, up, up_scales, up_shape, down, down_scales, down_shape, format, group, up_bias, down_bias, saliency, thresholds,
           threshold, k, union):
    ups = _packed(up, up_scales, up_shape, format, group, "outputs")
    downs = _packed(down, down_scales, down_shape, format, group, "inputs")
    if native.can(x, ups) and g.dtype in library.FLOATS:
        return native.gated(x, g, ups, downs, up_bias, down_bias, saliency, thresholds, threshold, k, union)
    with torch.cuda.device_of(x):
        return _other(x).gated(
            x, g, _whole(ups), _whole(downs), threshold=_rule(thresholds, threshold, k), k=k if k >= 0 else None,
            saliency=saliency, up_bias=up_bias, down_bias=down_bias, union=union)


for _name, _run in (("input_sparse", _input_sparse), ("linear", _linear), ("glu", _glu), ("gated", _gated),
                    ("nm_select", _nm_select)):
    for _device in ("CPU", "CUDA"):
        _registry.impl(_name, _run, _device)


@torch.library.register_fake("sparsity::input_sparse", lib=_registry)
def _(x, weight, weight_scales, weight_shape, *rest):
    return x.new_empty(x.shape[0], weight_shape[1])


@torch.library.register_fake("sparsity::nm_select", lib=_registry)
def _(x, n, m, shift, scale, back, repair, bits):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], (x.shape[1] + 7) // 8 if bits else 0), dtype=torch.uint8)


@torch.library.register_fake("sparsity::linear", lib=_registry)
def _(x, weight, weight_scales, weight_shape, *rest):
    return x.new_empty(x.shape[0], weight_shape[0])


@torch.library.register_fake("sparsity::glu", lib=_registry)
def _(x, gate, gate_scales, gate_shape, up, up_scales, up_shape, down, down_scales, down_shape, *rest):
    return x.new_empty(x.shape[0], down_shape[1])


@torch.library.register_fake("sparsity::gated", lib=_registry)
def _(x, g, up, up_scales, up_shape, down, down_scales, down_shape, *rest):
    return x.new_empty(x.shape[0], down_shape[1])


def direct(x: Tensor, weight: Packed | None = None) -> bool:
    """Whether a call may go straight to the compiled library: nobody traces, intercepts or wraps what torch does.

    Going through torch's dispatcher costs as much as a small matrix-vector product.
    """
    return (type(x) is Tensor and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode() and native.can(x, weight))
