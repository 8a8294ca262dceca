"""The operators' contract in plain PyTorch: what every backend's numbers are compared with, and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib.ops.packed import Packed
from sparsity_lib.parts.select import exact_topk

#: Tokens of one batch; more are cut into several.
BATCH = 16
#: Entries of a group of N:M at most.
WIDEST_GROUP = 64
#: Activation functions of gated FFNs by name, with the C++ side's numbers.
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4}


def keep(
    x: Tensor, *, threshold: Tensor | float | None, k: int | None, shift: Tensor | None = None, scale: Tensor | None = None,
    m: int = 0,
) -> Tensor:
    """Mask of x [tokens, n]: |x - shift| * scale not <= threshold (NaN stays in), or among the k largest of its token.

    m: among the k largest of every m consecutive entries (0: of all); the last m may be fewer, and k of them are kept too.
    """
    score = (x.float() - shift if shift is not None else x.float()).abs()
    score = score * scale if scale is not None else score
    if k is None:
        return ~(score <= threshold)
    return exact_topk(score, k) if not m else _of_every(score, k, m)


def _of_every(score: Tensor, n: int, m: int) -> Tensor:
    width = score.shape[-1]
    padded = functional.pad(score, (0, -width % m), value=-1.0)  # below every score
    return exact_topk(padded.view(len(score), padded.shape[-1] // m, m), n).view(padded.shape)[:, :width]


def repaired(kept: Tensor, value: Tensor) -> Tensor:
    """kept * sqrt(Var(value) / Var(kept)) for each token [tokens, width]; float32. What is 0 stays 0.

    Kept entries that do not vary stay as they are.
    """
    of_all, of_kept = value.double().var(-1, correction=0), kept.double().var(-1, correction=0)
    factor = torch.where(of_kept == 0, 1.0, (of_all / of_kept).sqrt()).float()[:, None]
    return torch.where(kept == 0, 0.0, kept * factor)


def nm_select(
    x: Tensor, n: int, m: int, *, shift: Tensor | None = None, scale: Tensor | None = None, back: bool = False,
    repair: bool = False, bits: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [tokens, width] with n of every m entries kept, by |x - shift| * scale, and the packed mask if `bits`.

    z = x - shift; the result is repair(kept z), plus the shift again if `back`; in float32, then x's dtype.
    """
    mask = keep(x, threshold=None, k=n, shift=shift, scale=scale, m=m)
    value = x.float() if shift is None else x.float() - shift
    found = torch.where(mask, value, 0.0)
    if repair:
        found = repaired(found, value)
    if back and shift is not None:
        found = found + shift if repair else torch.where(mask, x.float(), shift)  # x - m + m is x
    return found.to(x.dtype), pack_bits(mask) if bits else x.new_empty((len(x), 0), dtype=torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """Mask [tokens, width] -> uint8 [tokens, (width + 7) / 8]: bit i % 8 of byte i / 8 is entry i."""
    eight = functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).view(len(mask), -(-mask.shape[-1] // 8), 8)
    return (eight << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1).to(torch.uint8)


def unpack_bits(bits: Tensor, width: int) -> Tensor:
    """The inverse of `pack_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> places) & 1).bool().flatten(-2)[..., :width]


def _shared(mask: Tensor) -> Tensor:
    """What any token of each batch of `BATCH` keeps, for all of them."""
    return torch.cat([part.any(0, keepdim=True).expand_as(part) for part in mask.split(BATCH)]) if len(mask) else mask


def input_sparse(
    x: Tensor, weight: Packed, *, threshold: Tensor | float | None = None, k: int | None = None, shift: Tensor | None = None,
    scale: Tensor | None = None, bias: Tensor | None = None, union: bool = False, m: int = 0, repair: bool = False,
) -> Tensor:
    """y_o = sum over kept i of (x_i - shift_i) W[o, i] + bias_o, for x [tokens, in]; in float32, then x's dtype.

    threshold: one number, or [in] one an entry, or [stripes, in] of a weight packed in stripes.
    union: a token uses every entry that any token of its batch (16 in a row) keeps.
    m, repair: as in `keep` and `repaired`.
    """
    matrix, value = weight.dense(), x.float() if shift is None else x.float() - shift
    rules = list(threshold) if weight.stripe else [threshold]
    found = torch.empty(len(x), weight.outputs, device=x.device)
    for stripe, rule in enumerate(rules):
        width = weight.stripe or weight.outputs
        part = slice(stripe * width, (stripe + 1) * width)
        mask = keep(x, threshold=rule, k=k, shift=shift, scale=scale, m=m)
        kept = torch.where(_shared(mask) if union else mask, value, 0)
        found[:, part] = (repaired(kept, value) if repair else kept) @ matrix[part].T
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
    x: Tensor, gate: Packed, up: Packed, down: Packed, *, activation: str, threshold: Tensor | float | None = None,
    k: int | None = None, saliency: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, union: bool = False,
) -> Tensor:
    """y = W_down (m * g * (W_up x)), g = act(W_gate x), m the neurons kept by |g| * saliency; x [tokens, in]."""
    g = x.float() @ gate.dense().T
    g = activate(g if gate_bias is None else g + gate_bias, activation)
    return gated(
        x, g, up, down, threshold=threshold, k=k, saliency=saliency, up_bias=up_bias, down_bias=down_bias, union=union)


def gated(
    x: Tensor, g: Tensor, up: Packed, down: Packed, *, threshold: Tensor | float | None = None, k: int | None = None,
    saliency: Tensor | None = None, up_bias: Tensor | None = None, down_bias: Tensor | None = None, union: bool = False,
) -> Tensor:
    """`glu` where g [tokens, neurons] is known. threshold: one number, or [neurons]."""
    wide, g = x.float(), g.float()
    mask = keep(g, threshold=threshold, k=k, scale=saliency)
    mask = _shared(mask) if union else mask
    u = wide @ up.dense().T
    h = torch.where(mask, g * (u if up_bias is None else u + up_bias), 0)
    y = h @ down.dense().T
    return (y if down_bias is None else y + down_bias).to(x.dtype)
