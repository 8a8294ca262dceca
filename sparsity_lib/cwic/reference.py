"""The granular product in plain PyTorch: all stripes' masked inputs at once, gradients by autograd.

What the papers say they trained with, and what `granular` is compared with, in numbers and in time. Its memory is
[tokens, stripes, in], several times over.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_step(z: Tensor, eps: Tensor) -> Tensor:
    """The ramp whose derivative is the rectangle: min(max(z / eps + 1/2, 0), 1)."""
    return (z / eps + 0.5).clamp(0, 1)


def step(z: Tensor, eps: Tensor) -> Tensor:
    """H(z), with the gradient of `soft_step`."""
    soft = soft_step(z, eps)
    return (z >= 0).to(soft.dtype) + soft - soft.detach()


def granular_matmul(
    x: Tensor, weight: Tensor, theta: Tensor, mean: Tensor, scale: Tensor, eps: Tensor, *, width: int,
    straight_through: bool = True, gate=step,
) -> tuple[Tensor, Tensor]:
    """`granular.granular_matmul` for stripes of equal width; with gate=soft_step, the smoothed function of theta.

    Each stop of a gradient is a `detach` here: |x| of the product's gate, and the gate where x goes straight through.
    """
    shifted = x - mean
    threshold = theta * scale
    learned = gate(shifted.detach().abs()[:, None] - threshold, eps)  # [tokens, stripes, in]
    if straight_through:  # value and theta's gradient of the masked input, x's gradient of the unmasked one
        masked = learned * shifted.detach()[:, None] + shifted[:, None] - shifted.detach()[:, None]
    else:
        masked = learned * shifted[:, None]
    blocks = weight.view(len(theta), width, -1)
    y = torch.einsum("tki,koi->tko", masked, blocks).flatten(1) + weight @ mean
    priced = gate(shifted.abs()[:, None] - threshold, eps)
    return y, priced.sum((1, 2)) * width
