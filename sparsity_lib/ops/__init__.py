"""Operators that leave weights unread: one contract, and the fastest backend at hand behind it.

    w = pack(linear.weight, skip="inputs")             # once
    y = input_sparse(x, w, threshold=0.3)              # entries with |x| <= 0.3 cost nothing

CPU: C++ (kernels/cpu), compiled by the install; without a compiler, plain PyTorch and one warning.
GPU: Triton (ops/gpu); without it, plain PyTorch and one warning.

Layers that read the same x are one launch if their weights are packed as one: pack(torch.cat([q, k, v]), skip="inputs").
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsity_lib.errors import refuse, unknown
from sparsity_lib.ops import arguments, library, native, operators
from sparsity_lib.ops.packed import FORMATS, Packed, pack, pair
from sparsity_lib.ops.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "FORMATS", "Packed", "gated", "glu", "input_sparse", "linear", "nm_select", "pack", "pair"]

Share = Literal["own", "union"]
Repair = Literal["variance"]


def input_sparse(
    x: Tensor, weight: Packed, *, threshold: float | Tensor | None = None, k: int | None = None, n: int | None = None,
    m: int | None = None, shift: Tensor | None = None, scale: Tensor | None = None, bias: Tensor | None = None,
    share: Share = "own", repair: Repair | None = None, pad: bool = False,
) -> Tensor:
    """A linear layer that reads only the weights of the inputs it keeps.

        y_o = b_o + sum_i m_i (x_i - shift_i) W[o, i],   m_i = |x_i - shift_i| scale_i > threshold, or among the k largest

    The sum is taken in float32; with int4 weights and one token of bfloat16, x_i times the scale of W[o, i] is rounded to 16
    bits in units of the largest of eight rows (a CPU then adds whole numbers). NaN is kept, so that it stays visible; ties in
    rank go to the lower index.

    Parameters
    ----------
    x
        [..., in] float32, bfloat16, or float16 (which on a CPU plain PyTorch multiplies, slowly).
    weight
        Packed with skip="inputs".
    threshold
        One number; or [in], one an input; or, where the weight was packed in stripes, [stripes, in]: the outputs of stripe s
        follow row s (granular sparsity, as in CWIC). Such a weight takes no other rule.
    k
        Keep exactly k entries of each token instead.
    n, m, repair, pad
        Keep exactly n of every m consecutive inputs instead, as `nm_select` does, and repair what is kept as it does.
    shift, scale, bias
        float32 [in], [in], [out]. SCAP's shift m is exact if the bias holds b + W m.
    share
        "own": each token of the batch drops its own entries. "union": all use what any of them keeps (in
        batches of 16).

    Returns
    -------
    Tensor
        [..., out] in x's dtype.

    Raises
    ------
    SparsityError
        For a wrong shape, dtype or device, or not exactly one of threshold, k and n with m.
    """
    flat = arguments.flat(x, weight, "inputs")
    k, m = arguments.rank(threshold, k, n, m, weight.inputs, pad)
    if arguments.repaired(repair) and (not m or share == "union"):
        raise refuse("repair", repair, "None, unless n of every m are kept by each token alone", "n= and m=, share='own'")
    each = arguments.thresholds(threshold, weight, x)
    rule = (
        arguments.vector("shift", shift, (weight.inputs,), x), arguments.positive("scale", scale, (weight.inputs,), x), each,
        0.0 if each is not None or threshold is None else float(threshold), k,
        arguments.vector("bias", bias, (weight.outputs,), x), arguments.union(share), m, repair is not None)
    if operators.direct(flat, weight):
        y = native.input_sparse(flat, weight, *rule)
    else:
        y = torch.ops.sparsity.input_sparse(flat, *_parts(weight), weight.format, weight.group, *rule)
    return y.view(*x.shape[:-1], weight.outputs)


def nm_select(
    x: Tensor, n: int, m: int, *, shift: Tensor | None = None, scale: Tensor | None = None, back: bool = False,
    repair: Repair | None = None, bits: bool = False, pad: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """N:M pruning (arXiv 2509.22166): exactly n of every m consecutive channels stay, those with the largest scores.

        z = x - shift,   score_i = |z_i| scale_i,   y = repair(z kept) (+ shift)

    Ties go to the lower channel in every dtype, NaN ranks highest. Dropped channels are 0, or the shift where it is added back.

    Parameters
    ----------
    x
        [..., channels] float32, bfloat16 or float16.
    n, m
        1 <= n <= m <= 64.
    shift, scale
        float32 [channels]; scale at least 0.
    back
        Add the shift to the result again. Without, the bias of the layer behind has to hold W shift.
    repair
        "variance" (VAR): what is kept is multiplied by sqrt(Var(z) / Var(z kept)) of its token, dropped channels counting as 0.
    bits
        Return the mask too.
    pad
        Let the last group be shorter where m does not divide the channels, as if zeros followed: n of it are kept, or all.

    Returns
    -------
    Tensor, or (Tensor, Tensor)
        [..., channels] in x's dtype; with `bits` also uint8 [..., (channels + 7) / 8], bit i % 8 of byte i / 8 for channel i.

    Raises
    ------
    SparsityError
        For a wrong shape, dtype or device, or m that does not divide the channels without `pad`.
    """
    arguments.check_vectors(x)
    width = x.shape[-1]
    n, m = arguments.pattern(n, m, width, pad)
    moved, scaled = arguments.vector("shift", shift, (width,), x), arguments.positive("scale", scale, (width,), x)
    back, bits = arguments.flag("back", back), arguments.flag("bits", bits)
    rule = (n, m, moved, scaled, back, arguments.repaired(repair), bits)
    flat = x.detach().reshape(-1, width).contiguous()
    y, mask = native.nm_select(flat, *rule) if operators.direct(flat) else torch.ops.sparsity.nm_select(flat, *rule)
    return (y.view(x.shape), mask.view(*x.shape[:-1], -1 if len(flat) else -(-width // 8))) if bits else y.view(x.shape)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """y = W x + b for x [..., in] with W packed by skip="outputs", nothing skipped."""
    flat = arguments.flat(x, weight, "outputs")
    bias = arguments.vector("bias", bias, (weight.outputs,), x)
    if operators.direct(flat, weight):
        y = native.linear(flat, weight, bias)
    else:
        y = torch.ops.sparsity.linear(flat, *_parts(weight), weight.format, weight.group, bias)
    return y.view(*x.shape[:-1], weight.outputs)


def glu(
    x: Tensor, gate: Packed, up: Packed, down: Packed, *, activation: str, threshold: float | Tensor | None = None,
    k: int | None = None, saliency: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, share: Share = "own",
) -> Tensor:
    """A gated FFN that reads the up and down weights of the neurons it keeps (CATS, CLAWS).

        g = act(W_gate x),  m_j = |g_j| c_j > threshold or among the k largest,  y = W_down (m * g * (W_up x))

    Parameters
    ----------
    x
        [..., in] float32, bfloat16 or float16.
    gate, up, down
        Packed with skip="outputs", "outputs" and "inputs", in one format.
    threshold
        One number, or float32 [neurons].
    activation
        One of `ACTIVATIONS`.
    saliency
        c, float32 [neurons].

    Raises
    ------
    SparsityError
        For a wrong shape, dtype or device, formats that differ, or neither or both of threshold and k.
    """
    flat = arguments.flat(x, gate, "outputs")
    arguments.fits("up", up, "outputs", "gate", gate)
    arguments.fits("down", down, "inputs", "gate", gate)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    rule = (
        arguments.vector("gate_bias", gate_bias, (gate.outputs,), x),
        *arguments.neurons(x, down, up_bias, down_bias, saliency, threshold, k),
        ACTIVATIONS[activation], arguments.union(share))
    if operators.direct(flat, gate):
        y = native.glu(flat, gate, up, down, *rule)
    else:
        weights = (*_parts(gate), *_parts(up), *_parts(down))
        y = torch.ops.sparsity.glu(flat, *weights, gate.format, gate.group, *rule)
    return y.view(*x.shape[:-1], down.outputs)


def gated(
    x: Tensor, g: Tensor, up: Packed, down: Packed, *, threshold: float | Tensor | None = None, k: int | None = None,
    saliency: Tensor | None = None, up_bias: Tensor | None = None, down_bias: Tensor | None = None, share: Share = "own",
) -> Tensor:
    """`glu` where the gate was computed elsewhere: g [..., neurons] is act(W_gate x), of the same tokens as x.

    y = W_down (m * g * (W_up x)). Parameters and refusals are those of `glu`; g is float32, bfloat16 or float16.
    """
    flat = arguments.flat(x, up, "outputs")
    arguments.fits("down", down, "inputs", "up", up)
    arguments.check_vectors(g, up.outputs, "g")
    if g.shape[:-1] != x.shape[:-1] or g.device != x.device:
        raise refuse("shape of g", tuple(g.shape), f"{(*x.shape[:-1], up.outputs)} on {x.device}, as x has")
    gates = g.detach().reshape(-1, up.outputs).contiguous()
    rule = (*arguments.neurons(x, down, up_bias, down_bias, saliency, threshold, k), arguments.union(share))
    if operators.direct(flat, up) and g.dtype in library.FLOATS:
        y = native.gated(flat, gates, up, down, *rule)
    else:
        y = torch.ops.sparsity.gated(flat, gates, *_parts(up), *_parts(down), up.format, up.group, *rule)
    return y.view(*x.shape[:-1], down.outputs)


def _parts(weight: Packed) -> tuple[Tensor, Tensor | None, list[int]]:
    return weight.data, weight.scales, [weight.rows, weight.cols, weight.padded, weight.stripe]
