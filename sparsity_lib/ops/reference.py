"""The operators' contract in plain PyTorch: what every backend's numbers are compared with, and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib.ops.packed import Packed
from sparsity_lib.parts.select import exact_topk

#: Tokens of one batch; more are cut into several.
BATCH = 16
#: Activation functions of gated FFNs by name, with the C++ side's numbers.
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4}


def keep(
    x: Tensor, *, threshold: Tensor | float | None, k: int | None, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Mask of x [tokens, n]: |x - shift| * scale not <= threshold (NaN stays in), or among the k largest of its token."""
    score = (x.float() - shift if shift is not None else x.float()).abs()
    score = score * scale if scale is not None else score
    return exact_topk(score, k) if k is not None else ~(score <= threshold)


def _shared(mask: Tensor) -> Tensor:
    """What any token of each batch of `BATCH` keeps, for all of them."""
    return torch.cat([part.any(0, keepdim=True).expand_as(part) for part in mask.split(BATCH)]) if len(mask) else mask


def input_sparse(
    x: Tensor, weight: Packed, *, threshold: Tensor | float | None = None, k: int | None = None, shift: Tensor | None = None,
    scale: Tensor | None = None, stripe_width: int | None = None, bias: Tensor | None = None, union: bool = False,
) -> Tensor:
    """y_o = sum over kept i of (x_i - shift_i) W[o, i] + bias_o, for x [tokens, in]; in float32, then x's dtype.

    threshold: one number, or [in] one an entry, or [stripes, in] with one rule for each `stripe_width` outputs.
    union: a token uses every entry that any token of its batch (16 in a row) keeps.
    """
    matrix, value = weight.dense(), x.float() if shift is None else x.float() - shift
    striped = stripe_width is not None
    rules = list(threshold) if striped else [threshold]
    found = torch.empty(len(x), weight.outputs, device=x.device)
    for stripe, rule in enumerate(rules):
        last = stripe + 1 == len(rules)
        part = slice(stripe * (stripe_width or 0), None if last else (stripe + 1) * stripe_width)
        mask = keep(x, threshold=rule, k=k, shift=shift, scale=scale)
        mask = _shared(mask) if union else mask
        found[:, part] = torch.where(mask, value, 0) @ matrix[part].T
    return (found if bias is None else found + bias).to(x.dtype)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """y = W x + bias for x [tokens, in], nothing skipped."""
    found = x.float() @ weight.dense().T
    return (found if bias is None else found + bias).to(x.dtype)


def activate(x: Tensor, name: str) -> Tensor:
    """The activation function `name`."""
    if name == "none":
        return x
    if name == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    return {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}[name](x)


def glu(
    x: Tensor, gate: Packed, up: Packed, down: Packed, *, activation: str, threshold: float | None = None, k: int | None = None,
    saliency: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, union: bool = False,
) -> Tensor:
    """y = W_down (m * g * (W_up x)), g = act(W_gate x), m the neurons kept by |g| * saliency; x [tokens, in]."""
    wide = x.float()
    g = wide @ gate.dense().T
    g = activate(g if gate_bias is None else g + gate_bias, activation)
    mask = keep(g, threshold=threshold, k=k, scale=saliency)
    mask = _shared(mask) if union else mask
    u = wide @ up.dense().T
    h = torch.where(mask, g * (u if up_bias is None else u + up_bias), 0)
    y = h @ down.dense().T
    return (y if down_bias is None else y + down_bias).to(x.dtype)
