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

from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.ops import native, operators, reference
from sparsity_lib.ops.packed import FORMATS, Packed, pack, pair
from sparsity_lib.ops.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "FORMATS", "Packed", "glu", "input_sparse", "linear", "nm_select", "pack", "pair"]

Share = Literal["own", "union"]
Repair = Literal["variance"]
#: Outputs of a stripe come in whole pieces of this many.
STRIPE = 128


def input_sparse(
    x: Tensor, weight: Packed, *, threshold: float | Tensor | None = None, k: int | None = None, n: int | None = None,
    m: int | None = None, shift: Tensor | None = None, scale: Tensor | None = None, stripe_width: int | None = None,
    bias: Tensor | None = None, share: Share = "own", repair: Repair | None = None, pad: bool = False,
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
        One number; or [in], one an input; or, with `stripe_width`, [stripes, in]: outputs [s * stripe_width, ...) follow
        row s, the last stripe takes what is left (granular sparsity, as in CWIC).
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
    flat = _flat(x, weight, "inputs")
    k, m = _rank(threshold, k, n, m, weight.inputs, pad)
    if _repaired(repair) and (not m or share == "union"):
        raise refuse("repair", repair, "None, unless n of every m are kept by each token alone", "n= and m=, share='own'")
    each = _thresholds(threshold, stripe_width, weight, x)
    rule = (
        _vector("shift", shift, (weight.inputs,), x), _positive("scale", scale, (weight.inputs,), x), each,
        0.0 if each is not None or threshold is None else float(threshold), k, stripe_width or 0,
        _vector("bias", bias, (weight.outputs,), x), _union(share), m, repair is not None)
    if operators.direct(flat, weight):
        y = native.input_sparse(flat, weight, *rule)
    else:
        y = torch.ops.sparsity.input_sparse(flat, *_parts(weight), weight.format, weight.group, *rule)
    return y.view(*x.shape[:-1], weight.outputs)


def _rank(threshold, k, n, m, inputs: int, pad: bool) -> tuple[int, int]:
    """(entries kept, of how many consecutive ones; 0 for all of them), k < 0 for a threshold."""
    if n is None and m is None:
        return _rank_or_threshold(threshold, k, inputs), 0
    if threshold is not None or k is not None:
        raise SparsityError("Say what is kept: one of threshold=, k=, or n= with m=.")
    return _pattern(n, m, inputs, pad)


def _thresholds(threshold, stripe_width, weight: Packed, x: Tensor) -> Tensor | None:
    """Thresholds by input, or by stripe and input; None where there is one number or none."""
    if not isinstance(threshold, Tensor):
        if stripe_width is not None:
            raise refuse("threshold", threshold, "a tensor [stripes, in] where stripe_width is given")
        return None
    if stripe_width is None:
        return _vector("threshold", threshold, (weight.inputs,), x)
    if isinstance(stripe_width, bool) or not isinstance(stripe_width, int) or stripe_width < 1 or stripe_width % STRIPE:
        raise refuse("stripe_width", stripe_width, f"a multiple of {STRIPE}")
    return _vector("threshold", threshold, (max(1, -(-weight.outputs // stripe_width)), weight.inputs), x)


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
    _check_vectors(x)
    width = x.shape[-1]
    n, m = _pattern(n, m, width, pad)
    moved, scaled = _vector("shift", shift, (width,), x), _positive("scale", scale, (width,), x)
    arguments = (n, m, moved, scaled, back, _repaired(repair), bits)
    flat = x.detach().reshape(-1, width).contiguous()
    y, mask = native.nm_select(flat, *arguments) if operators.direct(flat) else torch.ops.sparsity.nm_select(flat, *arguments)
    return (y.view(x.shape), mask.view(*x.shape[:-1], -1 if len(flat) else -(-width // 8))) if bits else y.view(x.shape)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """y = W x + b for x [..., in] with W packed by skip="outputs", nothing skipped."""
    flat = _flat(x, weight, "outputs")
    bias = _vector("bias", bias, (weight.outputs,), x)
    if operators.direct(flat, weight):
        y = native.linear(flat, weight, bias)
    else:
        y = torch.ops.sparsity.linear(flat, *_parts(weight), weight.format, weight.group, bias)
    return y.view(*x.shape[:-1], weight.outputs)


def glu(
    x: Tensor, gate: Packed, up: Packed, down: Packed, *, activation: str, threshold: float | None = None, k: int | None = None,
    saliency: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
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
    activation
        One of `ACTIVATIONS`.
    saliency
        c, float32 [neurons].

    Raises
    ------
    SparsityError
        For a wrong shape, dtype or device, formats that differ, or neither or both of threshold and k.
    """
    flat = _flat(x, gate, "outputs")
    for name, packed, skip, shape in (("up", up, "outputs", (gate.outputs, gate.inputs)), ("down", down, "inputs", None)):
        if not isinstance(packed, Packed) or packed.skip != skip:
            raise refuse(name, getattr(packed, "skip", packed), f"a weight packed with skip={skip!r}")
        if (packed.format, packed.group) != (gate.format, gate.group):
            raise refuse(f"format of {name}", packed.format, f"{gate.format!r} as gate has, with the same group")
        if shape and (packed.outputs, packed.inputs) != shape or not shape and packed.inputs != gate.outputs:
            raise refuse(f"shape of {name}", (packed.outputs, packed.inputs), "one that fits gate's")
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    k = _rank_or_threshold(threshold, k, gate.outputs)
    neurons = (gate.outputs,)
    rule = (
        _vector("gate_bias", gate_bias, neurons, x), _vector("up_bias", up_bias, neurons, x),
        _vector("down_bias", down_bias, (down.outputs,), x), _positive("saliency", saliency, neurons, x),
        0.0 if threshold is None else float(threshold), k, ACTIVATIONS[activation], _union(share))
    if operators.direct(flat, gate):
        y = native.glu(flat, gate, up, down, *rule)
    else:
        weights = (*_parts(gate), *_parts(up), *_parts(down))
        y = torch.ops.sparsity.glu(flat, *weights, gate.format, gate.group, *rule)
    return y.view(*x.shape[:-1], down.outputs)


def _parts(weight: Packed) -> tuple[Tensor, Tensor | None, list[int]]:
    return weight.data, weight.scales, [weight.rows, weight.cols, weight.padded]


def _flat(x: Tensor, weight: Packed, skip: str) -> Tensor:
    if not isinstance(weight, Packed) or weight.skip != skip:
        raise refuse("weight", getattr(weight, "skip", type(weight).__name__), f"one packed with skip={skip!r}", "see ops.pack")
    _check_vectors(x, weight.inputs)
    if x.device != weight.data.device:
        raise refuse("device of x", str(x.device), f"the weight's, {weight.data.device}")
    if x.dim() == 2 and not x.requires_grad and x.is_contiguous():
        return x
    return x.detach().reshape(-1, weight.inputs).contiguous()


def _check_vectors(x: Tensor, width: int | None = None) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise refuse("dtype of x", getattr(x, "dtype", type(x).__name__), "torch.float32, torch.bfloat16 or torch.float16")
    if x.dim() < 1 or x.shape[-1] < 1 or width is not None and x.shape[-1] != width:
        raise refuse("shape of x", tuple(x.shape), f"[..., {'at least 1' if width is None else width}]")
    if x.device.type not in ("cpu", "cuda"):
        raise refuse("device of x", str(x.device), "the CPU or a CUDA device")
    if torch.is_grad_enabled() and x.requires_grad:
        raise SparsityError("The operators have no gradients. Fix: call them under torch.no_grad(), or pass x.detach().")


def _pattern(n: object, m: object, width: int, pad: bool) -> tuple[int, int]:
    for name, value, most in (("m", m, reference.WIDEST_GROUP), ("n", n, m)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise refuse(name, value, f"a whole number in [1, {most}]", "2:4 is n=2, m=4")
    if width % m and not pad:
        raise refuse("m", m, f"a divisor of the {width} channels", "pad=True lets the last group be shorter")
    return n, m


def _repaired(repair: object) -> bool:
    if repair not in (None, "variance"):
        raise unknown("repair", repair, ("variance",))
    return repair is not None


def _rank_or_threshold(threshold: object, k: int | None, width: int) -> int:
    if (threshold is None) == (k is None):
        raise SparsityError("Say what is kept: either threshold= or k=, and not both.")
    if k is None:
        if not isinstance(threshold, Tensor) and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
            raise refuse("threshold", threshold, "a number or a float32 tensor")
        return -1
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= width:
        raise refuse("k", k, f"a whole number in [0, {width}]")
    return k


def _vector(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape or value.device != x.device:
        shown = f"{getattr(value, 'dtype', type(value).__name__)} {tuple(getattr(value, 'shape', ()))}"
        raise refuse(name, shown, f"a float32 tensor {list(shape)} on {x.device}")
    return value if value.is_contiguous() and not value.requires_grad else value.detach().contiguous()


def _positive(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    """`_vector` of numbers of at least 0. Each state of a tensor is looked at once: on a GPU, looking makes the host wait."""
    found = _vector(name, value, shape, x)
    if found is None or torch.compiler.is_compiling():
        return found
    state = (value.data_ptr(), None if value.is_inference() else value._version)  # inference tensors do not count changes
    if getattr(value, "_found_positive", None) != state or value.is_inference() and not value.is_cuda:
        if bool((found < 0).any()):
            raise refuse(name, float(found.min()), "numbers of at least 0")
        value._found_positive = state
    return found


def _union(share: str) -> bool:
    if share not in ("own", "union"):
        raise unknown("share", share, ("own", "union"))
    return share == "union"
