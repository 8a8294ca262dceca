"""The granular product: against plain autograd, finite differences of the smoothed function, and each stop of a gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsity_lib import SparsityError
from sparsity_lib.cwic import reference
from sparsity_lib.cwic.granular import granular_matmul, masks, stripes, threshold_mask

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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_gradients_are_those_of_plain_autograd(tokens, inputs, number, width, seed, straight_through):
    made = case(tokens, inputs, number * width, width, seed)
    g = torch.Generator().manual_seed(seed + 1)
    grad_y, price = torch.randn(tokens, number * width, generator=g), torch.randn(tokens, generator=g)
    found = []
    for matmul in (granular_matmul, reference.granular_matmul):
        own = learning(made, "x", "weight", "theta")
        y, cost = matmul(*own.values(), width=width, straight_through=straight_through)
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


def test_threshold_gradients_are_finite_differences_of_the_smoothed_objective():
    made = case(dtype=torch.float64)
    grad_y = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def smooth(theta, what):
        y, cost = reference.granular_matmul(
            *{**made, "theta": theta}.values(), width=2, gate=reference.soft_step)
        return (y * grad_y).sum() if what == "y" else cost.sum()

    for what in ("y", "cost"):
        own = learning(case(), "theta")
        y, cost = granular_matmul(*own.values(), width=2)
        ((y * grad_y.float()).sum() if what == "y" else cost.sum()).backward()
        expected = finite_differences(lambda theta, what=what: smooth(theta, what), made["theta"])
        torch.testing.assert_close(own["theta"].grad.double(), expected, rtol=1e-4, atol=1e-4)
        assert (own["theta"].grad != 0).float().mean() > 0.5


def test_the_cost_falls_with_thresholds_and_rises_with_the_size_of_x():
    """The sign that the papers' printed kernel has wrong: a threshold's gradient of the cost is never positive."""
    own = learning(case(), "x", "theta")
    granular_matmul(*own.values(), width=2)[1].sum().backward()
    assert (own["theta"].grad <= 0).all() and (own["theta"].grad < 0).any()
    outward = own["x"].grad * (own["x"] - own["mean"]).sign()
    assert (outward >= 0).all() and (outward > 0).any()


def test_the_costs_gradient_is_that_of_the_expected_hard_cost():
    """Over many tokens, d E[cost] / d theta by the rectangle is the finite difference of the hard count."""
    made = case(tokens=200_000, inputs=3, outputs=4, width=2)
    made["eps"] = 0.2 * made["scale"]
    own = learning(made, "theta")
    granular_matmul(*own.values(), width=2)[1].mean().backward()
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


def test_channels_that_never_vary_have_no_gradient_and_no_nan():
    made = case()
    made["scale"][2] = made["eps"][2] = 0.0
    made["x"][:, 2] = made["mean"][2]
    own = learning(made, "x", "theta")
    y, cost = granular_matmul(*own.values(), width=2)
    (y.sum() + cost.sum()).backward()
    assert own["x"].grad.isfinite().all() and not own["theta"].grad[:, 2].any()


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


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_neuron_mask_and_its_gradients(straight_through):
    g = torch.Generator().manual_seed(3)
    value, theta, scale = torch.randn(20, 5, generator=g), torch.rand(5, generator=g), torch.rand(5, generator=g) + 0.5
    eps, grad, price = 0.4 * scale, torch.randn(20, 5, generator=g), torch.randn(20, generator=g)
    own, limit = value.clone().requires_grad_(), theta.clone().requires_grad_()
    masked, cost = threshold_mask(own, limit, scale, eps, weights_each=7, straight_through=straight_through)
    kept = value.abs() >= theta * scale
    assert torch.equal(masked, value * kept) and torch.equal(cost, kept.sum(-1) * 7.0)
    ((masked * grad).sum() + (cost * price).sum()).backward()
    other, bound = value.clone().requires_grad_(), theta.clone().requires_grad_()
    gate = reference.step(other.detach().abs() - bound * scale, eps)
    plain = gate * other.detach() + other - other.detach() if straight_through else gate * other
    priced = reference.step(other.abs() - bound * scale, eps).sum(-1) * 7
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
