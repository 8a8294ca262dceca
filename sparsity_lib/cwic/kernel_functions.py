"""What stands in for the derivative of a step: (1 / eps) K(z / eps), K one of several kernel functions.

The papers train with the rectangle and say that others give similar results. Each K here is even, has integral 1 over u and
the rectangle's standard deviation, 1 / sqrt(12). The cost's gradient by a threshold is, in expectation, the density of |x|
smoothed by K; with equal deviations it is smoothed equally, to second order in eps, and `bandwidth` means the same for all.

    rectangle   K(u) = 1 for -1/2 <= u < 1/2, else 0
    triangle    K(u) = sqrt(2) max(0, 1 - sqrt(2) |u|)
    gaussian    K(u) = sqrt(6 / pi) exp(-6 u^2)
    biweight    K(u) = 15 / (16 h) max(0, 1 - u^2 / h^2)^2,    h = sqrt(7 / 12)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsity_lib.errors import unknown

KERNELS = ("rectangle", "triangle", "gaussian", "biweight")
RECTANGLE = KERNELS[0]
#: Keeps 1 / eps finite for channels that never vary (no kernel reaches their values).
TINY = 1e-30


def check_kernel(name: object) -> str:
    """The name if it is one of `KERNELS`; raises SparsityError for any other."""
    if not isinstance(name, str) or name not in KERNELS:
        raise unknown("kernel", name, KERNELS)
    return name


def near(kernel: str, size: Tensor, threshold: Tensor, eps: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """K((size - threshold) / eps) in `out`, and 0 where eps is.

    size, out and spare are float32 [tokens, in], threshold and eps [in]; `spare` is overwritten.
    """
    if kernel == "rectangle":
        torch.ge(size, threshold - eps / 2, out=out)
        return out.mul_(torch.lt(size, threshold + eps / 2, out=spare))
    torch.sub(size, threshold, out=out).div_(eps.clamp_min(TINY))
    if kernel == "triangle":
        out.abs_().mul_(-2).add_(math.sqrt(2)).clamp_(min=0)
    elif kernel == "gaussian":
        out.square_().mul_(-6).exp_().mul_(math.sqrt(6 / math.pi))
    else:
        out.square_().mul_(-12 / 7).add_(1).clamp_(min=0).square_().mul_(15 / 16 * math.sqrt(12 / 7))
    return out.mul_(eps > 0)
