"""The granular product in plain PyTorch: all stripes' masked inputs at once, gradients by autograd.

What the papers say they trained with, and what `granular` is compared with, in numbers and in time. Its memory is
[tokens, stripes, in], several times over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_step(z: Tensor, eps: Tensor, kernel: str = "rectangle") -> Tensor:
    """S(u) at u = z / eps, the integral of a kernel function up to u: what has the pseudo-derivative as its derivative.

    With t = max(-1, min(1, u / h)) for kernels that end at -h and h:

        rectangle   min(max(u + 1/2, 0), 1)
        triangle    1/2 + t - t |t| / 2,                        h = 1 / sqrt(2)
        gaussian    the normal distribution function of sqrt(12) u
        biweight    1/2 + 15/16 (t - 2/3 t^3 + 1/5 t^5),        h = sqrt(7 / 12)
    """
    u = z / eps
    if kernel == "rectangle":
        return (u + 0.5).clamp(0, 1)
    if kernel == "gaussian":
        return torch.special.ndtr(math.sqrt(12) * u)
    t = (u / {"triangle": math.sqrt(1 / 2), "biweight": math.sqrt(7 / 12)}[kernel]).clamp(-1, 1)
    return 0.5 + (t - t * t.abs() / 2 if kernel == "triangle" else 15 / 16 * (t - 2 / 3 * t**3 + t**5 / 5))


def step(z: Tensor, eps: Tensor, kernel: str = "rectangle") -> Tensor:
    """H(z), with the gradient of `soft_step`."""
    soft = soft_step(z, eps, kernel)
    return (z >= 0).to(soft.dtype) + soft - soft.detach()


def granular_matmul(
    x: Tensor, weight: Tensor, theta: Tensor, mean: Tensor, scale: Tensor, eps: Tensor, *, width: int,
    straight_through: bool = True, kernel: str = "rectangle", gate=step,
) -> tuple[Tensor, Tensor]:
    """`granular.granular_matmul` for stripes of equal width; with gate=soft_step, the smoothed function of theta.

    Each stop of a gradient is a `detach` here: |x| of the product's gate, and the gate where x goes straight through.
    """
    shifted = x - mean
    threshold = theta * scale
    learned = gate(shifted.detach().abs()[:, None] - threshold, eps, kernel)  # [tokens, stripes, in]
    if straight_through:  # value and theta's gradient of the masked input, x's gradient of the unmasked one
        masked = learned * shifted.detach()[:, None] + shifted[:, None] - shifted.detach()[:, None]
    else:
        masked = learned * shifted[:, None]
    blocks = weight.view(len(theta), width, -1)
    y = torch.einsum("tki,koi->tko", masked, blocks).flatten(1) + weight @ mean
    priced = gate(shifted.abs()[:, None] - threshold, eps, kernel)
    return y, priced.sum((1, 2)) * width
