"""Arguments of the operators: everything that can be passed wrong is refused here, before any pointer is followed."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.ops import reference
from sparsity_lib.ops.packed import Packed


def rank(threshold, k, n, m, inputs: int, pad: bool) -> tuple[int, int]:
    """(entries kept, of how many consecutive ones; 0 for all of them), k < 0 for a threshold."""
    if n is None and m is None:
        return rank_or_threshold(threshold, k, inputs), 0
    if threshold is not None or k is not None:
        raise SparsityError("Say what is kept: one of threshold=, k=, or n= with m=.")
    return pattern(n, m, inputs, pad)


def thresholds(threshold, weight: Packed, x: Tensor) -> Tensor | None:
    """Thresholds by input, or by stripe and input; None where there is one number or none."""
    if not isinstance(threshold, Tensor):
        if weight.stripe:
            raise refuse("threshold", threshold, f"a tensor [{weight.stripes}, {weight.inputs}] for a weight packed in stripes")
        return None
    shape = (weight.stripes, weight.inputs) if weight.stripe else (weight.inputs,)
    return vector("threshold", threshold, shape, x)


def fits(name: str, packed: object, skip: str, other: str, first: Packed) -> None:
    """Refuse a weight of a gated FFN that does not go with its first one, packed by neurons as well."""
    if not isinstance(packed, Packed) or packed.skip != skip or packed.stripe:
        raise refuse(name, getattr(packed, "skip", packed), f"a weight packed with skip={skip!r}, not in stripes")
    if (packed.format, packed.group) != (first.format, first.group):
        raise refuse(f"format of {name}", packed.format, f"{first.format!r} as {other} has, with the same group")
    if packed.rows != first.rows or skip == "outputs" and packed.cols != first.cols:
        raise refuse(f"shape of {name}", (packed.outputs, packed.inputs), f"one that fits {other}'s")


def neurons(x, down, up_bias, down_bias, saliency, threshold, k) -> tuple:
    """Biases behind the gate, and the rule that chooses neurons."""
    k, shape = rank_or_threshold(threshold, k, down.inputs), (down.inputs,)
    each = vector("threshold", threshold, shape, x) if isinstance(threshold, Tensor) else None
    return (
        vector("up_bias", up_bias, shape, x), vector("down_bias", down_bias, (down.outputs,), x),
        positive("saliency", saliency, shape, x), each, 0.0 if each is not None or threshold is None else float(threshold), k)


def flat(x: Tensor, weight: Packed, skip: str) -> Tensor:
    if not isinstance(weight, Packed) or weight.skip != skip:
        raise refuse("weight", getattr(weight, "skip", type(weight).__name__), f"one packed with skip={skip!r}", "see ops.pack")
    check_vectors(x, weight.inputs)
    if x.device != weight.data.device:
        raise refuse("device of x", str(x.device), f"the weight's, {weight.data.device}")
    if x.dim() == 2 and not x.requires_grad and x.is_contiguous():
        return x
    return x.detach().reshape(-1, weight.inputs).contiguous()


def check_vectors(x: Tensor, width: int | None = None, name: str = "x") -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise refuse(f"dtype of {name}", getattr(x, "dtype", type(x).__name__), "torch.float32, torch.bfloat16 or torch.float16")
    if x.dim() < 1 or x.shape[-1] < 1 or width is not None and x.shape[-1] != width:
        raise refuse(f"shape of {name}", tuple(x.shape), f"[..., {'at least 1' if width is None else width}]")
    if x.device.type not in ("cpu", "cuda"):
        raise refuse(f"device of {name}", str(x.device), "the CPU or a CUDA device")
    if torch.is_grad_enabled() and x.requires_grad:
        raise SparsityError("The operators have no gradients. Fix: call them under torch.no_grad(), or pass x.detach().")


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")
    return value


def pattern(n: object, m: object, width: int, pad: bool) -> tuple[int, int]:
    for name, value, most in (("m", m, reference.WIDEST_GROUP), ("n", n, m)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise refuse(name, value, f"a whole number in [1, {most}]", "2:4 is n=2, m=4")
    if width % m and not flag("pad", pad):
        raise refuse("m", m, f"a divisor of the {width} channels", "pad=True lets the last group be shorter")
    return n, m


def repaired(repair: object) -> bool:
    if repair not in (None, "variance"):
        raise unknown("repair", repair, ("variance",))
    return repair is not None


def rank_or_threshold(threshold: object, k: int | None, width: int) -> int:
    if (threshold is None) == (k is None):
        raise SparsityError("Say what is kept: either threshold= or k=, and not both.")
    if k is None:
        if not isinstance(threshold, Tensor) and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
            raise refuse("threshold", threshold, "a number or a float32 tensor")
        return -1
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= width:
        raise refuse("k", k, f"a whole number in [0, {width}]")
    return k


def vector(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape or value.device != x.device:
        shown = f"{getattr(value, 'dtype', type(value).__name__)} {tuple(getattr(value, 'shape', ()))}"
        raise refuse(name, shown, f"a float32 tensor {list(shape)} on {x.device}")
    return value if value.is_contiguous() and not value.requires_grad else value.detach().contiguous()


def positive(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    """`_vector` of numbers of at least 0. Each state of a tensor is looked at once: on a GPU, looking makes the host wait."""
    found = vector(name, value, shape, x)
    if found is None or torch.compiler.is_compiling():
        return found
    state = (value.data_ptr(), None if value.is_inference() else value._version)  # inference tensors do not count changes
    if getattr(value, "_found_positive", None) != state or value.is_inference() and not value.is_cuda:
        if bool((found < 0).any()):
            raise refuse(name, float(found.min()), "numbers of at least 0")
        value._found_positive = state
    return found


def union(share: str) -> bool:
    if share not in ("own", "union"):
        raise unknown("share", share, ("own", "union"))
    return share == "union"
