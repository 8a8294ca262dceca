"""The granular product: against plain autograd, finite differences of the smoothed function, and each stop of a gradient."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsity_lib import SparsityError
from sparsity_lib.cwic import reference
from sparsity_lib.cwic.granular import granular_matmul, masks, stripes, threshold_mask
from sparsity_lib.cwic.kernel_functions import KERNELS, near

NAMES = ("x", "weight", "theta", "mean", "scale", "eps")


def case(tokens=9, inputs=6, outputs=8, width=2, seed=0, dtype=torch.float32):
    """Inputs with thresholds in the middle of the values; eps wide enough that many entries lie inside."""
    g = torch.Generator().manual_seed(seed)
    number = -(-outputs // width)
    scale = torch.rand(inputs, generator=g) + 0.5
    made = {
        "x": torch.randn(tokens, inputs, generator=g), "weight": torch.randn(outputs, inputs, generator=g),
        "theta": torch.rand(number, inputs, generator=g), "mean": 0.3 * torch.randn(inputs, generator=g), "scale": scale,
        "eps": 0.4 * scale}
    return {name: t.to(dtype) for name, t in made.items()}


def learning(made, *names):
    return {name: t.clone().requires_grad_(name in names) for name, t in made.items()}


def by_definition(x, weight, theta, mean, scale, eps, width):
    """The equation, one entry of the sum at a time."""
    y, cost = torch.zeros(len(x), len(weight)), torch.zeros(len(x))
    for t in range(len(x)):
        for o in range(len(weight)):
            for i in range(x.shape[1]):
                d = x[t, i] - mean[i]
                kept = bool(d.abs() >= theta[o // width, i] * scale[i])
                y[t, o] += weight[o, i] * (d * kept + mean[i])
                cost[t] += kept
    return y, cost


@pytest.mark.parametrize("width", [2, 3, 8])
def test_it_is_the_equation(width):
    made = case(width=width)
    y, cost = granular_matmul(*made.values(), width=width)
    expected, read = by_definition(*made.values(), width)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cost, read) and 0 < float(cost.mean()) < 48
    assert [part.stop - part.start for part in stripes(8, 3)] == [3, 3, 2]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.booleans(),
       st.sampled_from(KERNELS))
def test_gradients_are_those_of_plain_autograd(tokens, inputs, number, width, seed, straight_through, kernel):
    made = case(tokens, inputs, number * width, width, seed)
    g = torch.Generator().manual_seed(seed + 1)
    grad_y, price = torch.randn(tokens, number * width, generator=g), torch.randn(tokens, generator=g)
    found = []
    for matmul in (granular_matmul, reference.granular_matmul):
        own = learning(made, "x", "weight", "theta")
        y, cost = matmul(*own.values(), width=width, straight_through=straight_through, kernel=kernel)
        ((y * grad_y).sum() + (cost * price).sum()).backward()
        found.append((y, cost, own["x"].grad, own["weight"].grad, own["theta"].grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def finite_differences(function, at, by=1e-6):
    """Central differences of a scalar function, one entry at a time, in float64."""
    grad = torch.zeros_like(at)
    for place in range(at.numel()):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[place] += sign * by
            ends.append(function(moved))
        grad.view(-1)[place] = (ends[0] - ends[1]) / (2 * by)
    return grad


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_finite_differences_of_the_smoothed_objective(kernel):
    """Of y and of the cost by thresholds, and of the cost by x."""
    made = case(dtype=torch.float64)
    grad_y = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def smooth(what, name, value):
        y, cost = reference.granular_matmul(
            *{**made, name: value}.values(), width=2, kernel=kernel, gate=reference.soft_step)
        return (y * grad_y).sum() if what == "y" else cost.sum()

    for what, name in (("y", "theta"), ("cost", "theta"), ("cost", "x")):
        own = learning(case(), name)
        y, cost = granular_matmul(*own.values(), width=2, kernel=kernel)
        ((y * grad_y.float()).sum() if what == "y" else cost.sum()).backward()
        expected = finite_differences(lambda value, what=what, name=name: smooth(what, name, value), made[name])
        torch.testing.assert_close(own[name].grad.double(), expected, rtol=1e-4, atol=1e-4)
        assert (own[name].grad != 0).float().mean() > 0.5


def kernel_at(kernel, u):
    """K at u [n], float64."""
    zero = torch.zeros(len(u), dtype=torch.float64)
    return near(kernel, u[None].double(), zero, zero + 1, zero[None].clone(), zero[None].clone())[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_function_is_a_density_of_the_rectangles_deviation(kernel):
    u = (torch.arange(-40_000, 40_000).double() + 0.5) / 10_000  # midpoints: no edge of the rectangle is one of them
    found = kernel_at(kernel, u)
    assert (found >= 0).all() and torch.equal(found, found.flip(0))
    assert float(found.mean() * 8) == pytest.approx(1, abs=1e-4)
    assert float((found * u**2).mean() * 8) == pytest.approx(1 / 12, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KERNELS), st.floats(-1.5, 1.5), st.floats(0.01, 100), st.floats(0, 50))
def test_a_kernel_function_is_the_slope_of_the_smooth_step(kernel, u, eps, threshold):
    """And depends on z / eps alone."""
    width = torch.tensor([eps], dtype=torch.float64)
    ends = [reference.soft_step(width * (u + by), width, kernel) for by in (1e-5, -1e-5)]
    slope = float((ends[0] - ends[1]) / 2e-5)
    assert -1e-12 <= float(ends[1]) <= float(ends[0]) <= 1 + 1e-12
    assume(kernel != "rectangle" or abs(abs(u) - 0.5) > 1e-4)  # its edges have no slope
    found = near(kernel, width[None] * u + threshold, width * 0 + threshold, width, *torch.empty(2, 1, 1, dtype=torch.float64))
    assert float(found) == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_cost_falls_with_thresholds_and_rises_with_the_size_of_x(kernel):
    """The sign that the papers' printed kernel has wrong: a threshold's gradient of the cost is never positive."""
    own = learning(case(), "x", "theta")
    granular_matmul(*own.values(), width=2, kernel=kernel)[1].sum().backward()
    assert (own["theta"].grad <= 0).all() and (own["theta"].grad < 0).any()
    outward = own["x"].grad * (own["x"] - own["mean"]).sign()
    assert (outward >= 0).all() and (outward > 0).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_costs_gradient_is_that_of_the_expected_hard_cost(kernel):
    """Over many tokens, d E[cost] / d theta by the kernel is the finite difference of the hard count."""
    made = case(tokens=200_000, inputs=3, outputs=4, width=2)
    made["eps"] = 0.2 * made["scale"]
    own = learning(made, "theta")
    granular_matmul(*own.values(), width=2, kernel=kernel)[1].mean().backward()
    for r, i in ((0, 0), (1, 2)):
        ends = []
        for sign in (1, -1):
            theta = made["theta"].clone()
            theta[r, i] += sign * 0.1
            ends.append(float(granular_matmul(*{**made, "theta": theta}.values(), width=2)[1].mean()))
        assert float(own["theta"].grad[r, i]) == pytest.approx((ends[0] - ends[1]) / 0.2, rel=0.03)


def test_x_goes_straight_through_and_not_through_its_size():
    made = case()
    grad_y = torch.randn(9, 8)
    own = learning(made, "x")
    y, _ = granular_matmul(*own.values(), width=2)
    (y * grad_y).sum().backward()
    torch.testing.assert_close(own["x"].grad, grad_y @ made["weight"])  # W^T and nothing else: |x| got none
    own = learning(made, "x")
    y, _ = granular_matmul(*own.values(), width=2, straight_through=False)
    (y * grad_y).sum().backward()
    kept = [mask.float() for mask in masks(*(made[n] for n in ("x", "theta", "mean", "scale")))]
    expected = sum(k * (grad_y[:, part] @ made["weight"][part]) for k, part in zip(kept, stripes(8, 2), strict=True))
    torch.testing.assert_close(own["x"].grad, expected)


def test_the_weight_learns_from_the_product_alone_and_statistics_from_nothing():
    own = learning(case(), "weight")
    y, cost = granular_matmul(*own.values(), width=2)
    assert not torch.autograd.grad(cost.sum(), own["weight"], retain_graph=True)[0].any()
    x, mean = own["x"], own["mean"]
    y[:, 0].sum().backward()
    kept = next(masks(x, own["theta"], mean, own["scale"])).float()
    torch.testing.assert_close(own["weight"].grad[0], (kept * (x - mean) + mean).sum(0))
    for name in ("mean", "scale", "eps"):
        with pytest.raises(SparsityError, match="get none"):
            granular_matmul(*learning(case(), name, "x").values(), width=2)[0].sum().backward()


def test_a_hard_sigmoid_backward_is_a_rectangle_at_six_times_the_width():
    z = torch.linspace(-1, 1, 401, requires_grad=True)
    eps = torch.tensor(0.1)
    nn.functional.hardsigmoid(z / eps).sum().backward()
    by_hard_sigmoid, z.grad = z.grad.clone(), None
    reference.soft_step(z, 6 * eps).sum().backward()
    inside = (z.detach().abs() - 0.3).abs() > 1e-3
    torch.testing.assert_close(by_hard_sigmoid[inside], z.grad[inside])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_channels_that_never_vary_have_no_gradient_and_no_nan(kernel, normalise, value):
    """Not on their thresholds either: without normalisation, 1 / eps would be all that multiplies K(0)."""
    made = case()
    made["eps"][2], made["scale"][2], made["theta"][:, 2], made["mean"][2] = 0.0, float(not normalise), value, 0.0
    made["x"][:, 2] = value
    own = learning(made, "x", "theta")
    y, cost = granular_matmul(*own.values(), width=2, kernel=kernel)
    (y.sum() + cost.sum()).backward()
    assert own["x"].grad.isfinite().all() and not own["theta"].grad[:, 2].any()
    torch.testing.assert_close(own["x"].grad[:, 2], made["weight"][:, 2].sum().expand(9))
    g, limit = (made[name].clone().requires_grad_() for name in ("x", "theta"))
    masked, cost = threshold_mask(g, limit[0], made["scale"], made["eps"], weights_each=7, kernel=kernel)
    (masked.sum() + cost.sum()).backward()
    assert torch.equal(g.grad[:, 2], torch.ones(9)) and not limit.grad[:, 2].any() and limit.grad.isfinite().all()


def test_memory_does_not_grow_with_stripes():
    """What autograd keeps from the forward is the inputs, whatever the number of stripes."""
    kept = []
    for width in (64, 1):
        made, seen = learning(case(tokens=32, inputs=64, outputs=64, width=width), "x", "weight", "theta"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.numel()) or t, lambda t: t):
            granular_matmul(*made.values(), width=width)
        kept.append(sum(seen) - made["theta"].numel())
    assert kept[0] == kept[1] == 32 * 64 + 64 * 64 + 3 * 64


def test_autocast_multiplies_in_bfloat16_with_masks_in_float32():
    made = case()
    with torch.autocast("cpu", torch.bfloat16):
        own = learning(made, "x", "weight", "theta")
        y, cost = granular_matmul(*own.values(), width=2)
    exact, read = granular_matmul(*made.values(), width=2)
    assert y.dtype == torch.bfloat16 and torch.equal(cost, read)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    (y.sum() + cost.sum()).backward()
    assert all(own[name].grad.dtype == torch.float32 for name in ("x", "weight", "theta"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("straight_through", [True, False])
def test_the_neuron_mask_and_its_gradients(straight_through, kernel):
    g = torch.Generator().manual_seed(3)
    value, theta, scale = torch.randn(20, 5, generator=g), torch.rand(5, generator=g), torch.rand(5, generator=g) + 0.5
    eps, grad, price = 0.4 * scale, torch.randn(20, 5, generator=g), torch.randn(20, generator=g)
    own, limit = value.clone().requires_grad_(), theta.clone().requires_grad_()
    masked, cost = threshold_mask(own, limit, scale, eps, weights_each=7, straight_through=straight_through, kernel=kernel)
    kept = value.abs() >= theta * scale
    assert torch.equal(masked, value * kept) and torch.equal(cost, kept.sum(-1) * 7.0)
    ((masked * grad).sum() + (cost * price).sum()).backward()
    other, bound = value.clone().requires_grad_(), theta.clone().requires_grad_()
    gate = reference.step(other.detach().abs() - bound * scale, eps, kernel)
    plain = gate * other.detach() + other - other.detach() if straight_through else gate * other
    priced = reference.step(other.abs() - bound * scale, eps, kernel).sum(-1) * 7
    ((plain * grad).sum() + (priced * price).sum()).backward()
    torch.testing.assert_close(own.grad, other.grad)
    torch.testing.assert_close(limit.grad, bound.grad)


def test_shapes_that_do_not_fit_are_refused():
    made = case()
    for name, bad in (("theta", torch.zeros(3, 6)), ("mean", torch.zeros(5)), ("x", torch.zeros(9, 5))):
        with pytest.raises(SparsityError, match=f"shape of {name}"):
            granular_matmul(*{**made, name: bad}.values(), width=2)
    with pytest.raises(SparsityError, match="one a neuron"):
        threshold_mask(torch.zeros(2, 3), torch.zeros(2), torch.ones(3), torch.ones(3), weights_each=1)


@pytest.mark.parametrize("name", ["gauss", "Rectangle", "", None, ["triangle"]])
def test_unknown_kernel_functions_are_refused_with_those_there_are(name):
    said = "is unknown: expected one of biweight, gaussian, rectangle, triangle"
    with pytest.raises(SparsityError, match=f"kernel = .*{said}"):
        granular_matmul(*case().values(), width=2, kernel=name)
    with pytest.raises(SparsityError, match=said):
        threshold_mask(torch.zeros(2, 3), *[torch.ones(3)] * 3, weights_each=1, kernel=name)
