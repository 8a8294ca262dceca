"""The granular matrix product of CWIC: each stripe of outputs has its own mask of inputs, and masks learn.

    y^(r) = sum_i G[r, i] (x_i - m_i) W^(r)[:, i] + W^(r) m,    G[r, i] = H(|x_i - m_i| - theta[r, i] s_i)

for stripes r of the outputs (equations of sections 3.1, 3.2 and 3.4). The step H has derivative zero almost everywhere;
in its place stands a rectangle of width eps_i around the threshold,

    dH(z)/dz := (1 / eps) K(z / eps),    K(z) = H(z + 1/2) - H(z - 1/2),

or another kernel function of the same standard deviation (`kernel_functions`).

Both papers print K with the two signs exchanged, which would make it negative and raise each threshold where it should
fall; the rectangle (and JumpReLU's, which they cite) is the negation of what is printed. A hard sigmoid in the backward
pass, as in released code, is the same thing: its derivative is a rectangle, at six times the width for torch's.

What gradients do (section 3.3):

    x       from y: W^T as if nothing were masked; nothing through |x|. From the cost: through |x|, by the kernel.
    theta   from y and from the cost, by the kernel.
    W       from y, of the masked product as it was computed.
    m, s, eps   none.

Stripes are processed one after the other and masks are computed again in the backward pass, so that memory does not grow
with the number of stripes. Tensors on a GPU take Triton's kernels (`sparsity_lib.ops.gpu.granular`), which do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from sparsity_lib.cwic.kernel_functions import RECTANGLE, TINY, check_kernel, near
from sparsity_lib.errors import refuse
from sparsity_lib.ops import gpu


def stripes(outputs: int, width: int) -> Iterator[slice]:
    """The outputs of each stripe; the last takes what is left."""
    for start in range(0, outputs, width):
        yield slice(start, min(start + width, outputs))


def granular_matmul(
    x: Tensor, weight: Tensor, theta: Tensor, mean: Tensor, scale: Tensor, eps: Tensor, *, width: int,
    straight_through: bool = True, kernel: str = RECTANGLE, triton: bool = True,
) -> tuple[Tensor, Tensor]:
    """The product, and what it costs.

    Parameters
    ----------
    x
        [tokens, in].
    weight
        [out, in].
    theta
        Thresholds [stripes, in], at least 0.
    mean, scale, eps
        m, s and the kernel's width, float32 [in]; they receive no gradients.
    width
        Outputs a stripe; the last takes what is left.
    straight_through
        False: x gets the gradients of the masked product (still none through |x|).
    kernel
        K, one of `kernel_functions.KERNELS`.
    triton
        False: plain PyTorch on a GPU too.

    Returns
    -------
    y, cost
        [tokens, out] in the products' dtype (autocast's, or the weight's), and the weights each token read, float32 [tokens].

    Raises
    ------
    SparsityError
        If shapes do not fit together, or the kernel is unknown.
    """
    inputs = weight.shape[1]
    expected = {
        "x": (x, (len(x), inputs)), "mean": (mean, (inputs,)), "scale": (scale, (inputs,)), "eps": (eps, (inputs,)),
        "theta": (theta, (-(-weight.shape[0] // width), inputs)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            of = f"a weight {tuple(weight.shape)} in stripes of {width}"
            raise refuse(f"shape of {name}", tuple(tensor.shape), f"{shape} for {of}")
    return _GranularMatmul.apply(x, weight, theta, mean, scale, eps, width, straight_through, check_kernel(kernel), triton)


def threshold_mask(
    g: Tensor, theta: Tensor, scale: Tensor, eps: Tensor, *, weights_each: float, straight_through: bool = True,
    kernel: str = RECTANGLE,
) -> tuple[Tensor, Tensor]:
    """M * g with M = H(|g| - theta s), the mask over the neurons of a gated FFN (section 3.7), and what it costs.

    g is [tokens, neurons], the others are [neurons]; a neuron kept costs `weights_each` (its row of W_up and its column of
    W_down). Gradients as for `granular_matmul`: g straight through from the product, through |g| from the cost.

    Returns M * g in g's dtype, and float32 [tokens].
    """
    for name, tensor in (("theta", theta), ("scale", scale), ("eps", eps)):
        if tuple(tensor.shape) != (g.shape[-1],):
            raise refuse(f"shape of {name}", tuple(tensor.shape), f"({g.shape[-1]},), one a neuron")
    return _ThresholdMask.apply(g, theta, scale, eps, float(weights_each), straight_through, check_kernel(kernel))


def masks(x: Tensor, theta: Tensor, mean: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """G of each stripe in turn, boolean [tokens, in]."""
    size = (x.float() - mean).abs()
    for row in theta.detach().float():
        yield size >= row * scale


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _GranularMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, theta, mean, scale, eps, width, straight_through, kernel, triton):
        ctx.save_for_backward(x, weight, theta, mean, scale, eps)
        ctx.width, ctx.straight_through, ctx.kernel = width, straight_through, kernel
        ctx.dtype = _product_dtype(x, weight)
        ctx.triton = _triton(x, ctx.dtype) if triton else None
        with torch.autocast(x.device.type, enabled=False):  # it would round the mean's product as well
            if ctx.triton is not None:
                return ctx.triton.forward(x, weight.to(ctx.dtype), theta.float() * scale, mean, width)
            return _masked_product(x, weight.to(ctx.dtype), theta, mean, scale, width)

    @staticmethod
    def backward(ctx, grad_y, grad_cost):
        x, weight, theta, mean, scale, eps = ctx.saved_tensors
        wants_x, wants_weight, wants_theta = ctx.needs_input_grad[:3]
        if any(ctx.needs_input_grad[3:6]):
            raise refuse("mean, scale or eps", "tensors that require gradients", "constants: they get none", "detach them")
        w, grad_y = weight.to(ctx.dtype), grad_y.to(ctx.dtype)
        if ctx.triton is not None:
            grad_x, grad_w, grad_theta = ctx.triton.backward(
                x, w, theta.float() * scale, mean, eps, grad_y, grad_cost.float(), ctx.width, ctx.straight_through,
                ctx.kernel, (wants_x, wants_weight, wants_theta))
            if wants_theta:
                grad_theta = -grad_theta * (scale / eps.clamp_min(TINY))
            return _as_given(grad_x, grad_w, grad_theta, x, weight, theta)
        shifted = x.float() - mean
        size = shifted.abs()
        grad_x = torch.zeros_like(shifted) if wants_x else None
        hits = torch.zeros_like(shifted) if wants_x else None
        grad_w = torch.empty_like(w) if wants_weight else None
        grad_theta = torch.empty(theta.shape, device=x.device) if wants_theta else None
        buffer, spare, priced = torch.empty_like(shifted), torch.empty_like(shifted), grad_cost.float()[:, None]
        for number, part in enumerate(stripes(len(w), ctx.width)):
            threshold, outputs, below = theta[number].float() * scale, part.stop - part.start, grad_y[:, part]
            if wants_weight or not ctx.straight_through:
                torch.ge(size, threshold, out=buffer)
            back = (below @ w[part]).float() if wants_x or wants_theta else None
            if wants_x:
                grad_x += back if ctx.straight_through else back * buffer
            if wants_weight:
                torch.mm(below.T, buffer.mul_(shifted).add_(mean).to(ctx.dtype), out=grad_w[part])
            if wants_x or wants_theta:
                hit = near(ctx.kernel, size, threshold, eps, buffer, spare)
            if wants_x:
                hits.add_(hit, alpha=outputs)
            if wants_theta:
                each = back.mul_(shifted).add_(priced, alpha=outputs).mul_(hit)
                grad_theta[number] = -each.sum(0) * (scale / eps.clamp_min(TINY))
        if wants_x:
            grad_x += hits.mul_(shifted.sign_()).mul_(priced).div_(eps.clamp_min(TINY))
        return _as_given(grad_x, grad_w, grad_theta, x, weight, theta)


def _as_given(grad_x, grad_w, grad_theta, x, weight, theta) -> tuple[Tensor | None, ...]:
    """Gradients in their tensors' dtypes, and none for all that follows."""
    grads = zip((grad_x, grad_w, grad_theta), (x, weight, theta), strict=True)
    return *(grad if grad is None else grad.to(of.dtype) for grad, of in grads), *[None] * 7


def _triton(x: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """The kernels for tensors on this device, where they know both dtypes."""
    if gpu.load(x.device.type) is None:
        return None
    from sparsity_lib.ops.gpu import granular

    return granular if {x.dtype, dtype} <= set(granular.DTYPES) else None


def _masked_product(x, w, theta, mean, scale, width) -> tuple[Tensor, Tensor]:
    """y [tokens, out] in w's dtype, and the cost [tokens]."""
    shifted = x.float() - mean
    size, keep, cost = shifted.abs(), torch.empty_like(shifted), shifted.new_zeros(len(x))
    y = torch.empty(len(x), len(w), dtype=w.dtype, device=x.device)
    constant = (w.float() @ mean).to(w.dtype)
    for row, part in zip(theta.float(), stripes(len(w), width), strict=True):
        torch.ge(size, row * scale, out=keep)
        cost.add_(keep.sum(-1), alpha=part.stop - part.start)
        y[:, part] = torch.addmm(constant[part], keep.mul_(shifted).to(w.dtype), w[part].T)
    return y, cost


class _ThresholdMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, theta, scale, eps, weights_each, straight_through, kernel):
        ctx.save_for_backward(g, theta, scale, eps)
        ctx.weights_each, ctx.straight_through, ctx.kernel = weights_each, straight_through, kernel
        keep = g.float().abs() >= theta.float() * scale
        return torch.where(keep, g, 0), keep.float().sum(-1) * weights_each

    @staticmethod
    def backward(ctx, grad_masked, grad_cost):
        g, theta, scale, eps = ctx.saved_tensors
        if any(ctx.needs_input_grad[2:4]):
            raise refuse("scale or eps", "tensors that require gradients", "constants: they get none", "detach them")
        wide, threshold = g.float(), theta.float() * scale
        size = wide.abs()
        hit = near(ctx.kernel, size, threshold, eps, torch.empty_like(size), torch.empty_like(size))
        back, priced = grad_masked.float(), grad_cost.float()[:, None] * ctx.weights_each
        grad_theta = -((back * wide + priced) * hit).sum(0) * (scale / eps.clamp_min(TINY))
        straight = back if ctx.straight_through else back * (size >= threshold)
        grad_g = straight + priced * hit * wide.sign() / eps.clamp_min(TINY)
        return grad_g.to(g.dtype), grad_theta.to(theta.dtype), *[None] * 5
