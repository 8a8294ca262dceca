"""The granular layers: their statistics, their options, and what they refuse."""

import json

import pytest
import torch
from torch import nn

from sparsity_lib import SparsityError
from sparsity_lib.cwic import CWICConfig
from sparsity_lib.cwic.granular import granular_matmul, threshold_mask
from sparsity_lib.cwic.kernel_functions import KERNELS
from sparsity_lib.cwic.layers import CWICActivation, CWICLinear, Ledger
from sparsity_lib.cwic.statistics import Thresholds


def linear(config=None, outputs=8, bias=True, seed=0):
    torch.manual_seed(seed)
    return CWICLinear(nn.Linear(6, outputs, bias=bias), "l", "q", config or CWICConfig(stripe=2), Ledger())


def test_at_zero_thresholds_the_layer_is_the_linear_it_was():
    layer, x = linear(), torch.randn(3, 5, 6)
    layer.train()(x)  # the statistics are no longer zero and one
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.ledger.costs["l"], torch.full((15,), 48.0)) and layer.dense_cost == 48


def test_statistics_run_in_training_and_stand_still_after():
    thresholds, g = Thresholds(2, 4, CWICConfig(momentum=0.9), centred=True), torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, 4, generator=g) * 3 + 1 for _ in range(2))
    thresholds.observe(first)
    torch.testing.assert_close(thresholds.mean, first.mean(0))
    torch.testing.assert_close(thresholds.std, first.std(0, correction=0))
    thresholds.observe(second)
    torch.testing.assert_close(thresholds.mean, 0.9 * first.mean(0) + 0.1 * second.mean(0))
    torch.testing.assert_close(thresholds.std, 0.9 * first.std(0, correction=0) + 0.1 * second.std(0, correction=0))
    layer = linear()
    for quiet in (lambda: layer.eval()(first[:, :1].expand(-1, 6)), lambda: torch.no_grad()(layer.train())(torch.randn(4, 6))):
        before = layer.sparsity.mean.clone()
        quiet()
        assert torch.equal(layer.sparsity.mean, before)


def test_padding_and_diverging_steps_leave_no_trace_in_the_statistics():
    thresholds, x = Thresholds(1, 3, CWICConfig(), centred=True), torch.randn(10, 3)
    valid = torch.arange(10) < 6
    thresholds.observe(x, valid)
    torch.testing.assert_close(thresholds.mean, x[:6].mean(0))
    before = thresholds.mean.clone()
    thresholds.observe(torch.full((4, 3), torch.nan))
    assert torch.equal(thresholds.mean, before)


def test_released_statistics_are_the_geometric_median_and_the_mean_distance():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 3, generator=g) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, -2.0])
    thresholds = Thresholds(1, 3, CWICConfig(statistics="released"), centred=True)
    thresholds.observe(x)

    def distance(centre):
        return (x.double() - centre).norm(dim=-1).mean()

    best = distance(thresholds.mean.double())
    for axis in range(3):
        for by in (0.05, -0.05):
            assert distance(thresholds.mean.double() + by * torch.eye(3, dtype=torch.float64)[axis]) > best
    torch.testing.assert_close(thresholds.std, torch.tensor([1.0, 2.0, 0.5]), rtol=0.05, atol=0)  # sigma of normal numbers


def test_normalisation_and_straight_through_can_be_turned_off():
    layer, x = linear(CWICConfig(stripe=2, normalise=False)), torch.randn(40, 6) + 2
    layer.sparsity.theta.data.fill_(1.5)
    y = layer.train()(x)
    masked = torch.where(x.abs() >= 1.5, x, 0)  # neither the mean nor the deviation enters
    torch.testing.assert_close(y, nn.functional.linear(masked, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    layer = linear(CWICConfig(stripe=2, straight_through=False))
    layer.sparsity.theta.data.fill_(50.0)
    x = torch.randn(40, 6, requires_grad=True)
    layer.train()(x).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_layers_learn_by_the_configured_kernel(kernel):
    config, g = CWICConfig(stripe=2, bandwidth=1.0, kernel=kernel), torch.Generator().manual_seed(0)
    layer, x = linear(config), torch.randn(40, 6, generator=g)
    act = CWICActivation(nn.Identity(), "a", 6, 10, config, Ledger())
    for each in (layer, act):
        each.sparsity.theta.data.fill_(0.5)
        each.train()(x).square().sum().backward()
    theta = torch.full((4, 6), 0.5, requires_grad=True)
    y, _ = granular_matmul(x, layer.weight, theta, *layer.sparsity.rule(), width=2, kernel=kernel)
    (y + layer.bias).square().sum().backward()
    assert theta.grad.any() and torch.equal(layer.sparsity.theta.grad, theta.grad)
    theta = torch.full((6,), 0.5, requires_grad=True)
    threshold_mask(x, theta, *act.sparsity.rule()[1:], weights_each=10, kernel=kernel)[0].square().sum().backward()
    assert theta.grad.any() and torch.equal(act.sparsity.theta.grad[0], theta.grad)


def test_a_configuration_without_a_kernel_is_the_rectangle_and_says_no_more_than_it_did():
    assert CWICConfig.from_json({"stripe": 2, "bandwidth": 0.1}).kernel == "rectangle"
    assert "kernel" not in CWICConfig().to_json()  # a training that began without the choice goes on
    assert CWICConfig.from_json({"kernel": "rectangle"}) == CWICConfig()
    for kernel in KERNELS:
        assert CWICConfig.from_json(json.loads(json.dumps(CWICConfig(kernel=kernel).to_json()))).kernel == kernel
    with pytest.raises(SparsityError, match="kernel = 'box' is unknown"):
        CWICConfig.from_json({"kernel": "box"})


def test_the_activation_masks_neurons_by_size_and_centres_nothing():
    act = CWICActivation(nn.SiLU(), "a", 6, 10, CWICConfig(), Ledger()).train()
    z = torch.randn(2, 20, 6)
    act.sparsity.theta.data.fill_(0.5)
    g = nn.functional.silu(z)
    found = act(z)
    deviation = g.flatten(0, 1).std(0, correction=0)
    assert torch.equal(found, torch.where(g.abs() >= 0.5 * deviation, g, 0))
    assert torch.equal(act.ledger.costs["a"], (found != 0).flatten(0, 1).sum(-1) * 10.0) and act.dense_cost == 60


def test_thresholds_stay_float32_and_above_zero():
    layer = linear().to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert {t.dtype for t in layer.sparsity.state_dict().values()} == {torch.float32, torch.int64}
    layer.sparsity.theta.data.fill_(-1)
    layer.sparsity.clamp()
    assert not layer.sparsity.theta.any()
    assert layer(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("bad", "said"), [
    ({"stripe": 0}, "stripe"), ({"stripe": {"query": 2}}, "'query' is unknown"), ({"stripe": {"q": 1.5}}, "stripe of q"),
    ({"bandwidth": 0}, "bandwidth"), ({"momentum": 1.0}, "momentum"), ({"normalise": 1}, "normalise"),
    ({"statistics": "median"}, "statistics"), ({"kernel": "gauss"}, "kernel = 'gauss' is unknown.*did you mean 'gaussian'"),
    ({"kernel": None}, "kernel = None is unknown: expected one of biweight, gaussian, rectangle, triangle"),
])
def test_bad_configurations_are_refused_by_name(bad, said):
    with pytest.raises(SparsityError, match=said):
        CWICConfig(**bad)


def test_a_stripe_that_does_not_divide_the_outputs_is_refused_with_one_that_does():
    with pytest.raises(SparsityError, match=r"stripe of q = 3 is not allowed: expected a divisor of its 8 outputs.*Fix: 2"):
        linear(CWICConfig(stripe=3))
    layer = linear(CWICConfig(stripe=3, uneven=True))
    assert layer.sparsity.theta.shape == (3, 6) and layer.entry_weights() == [3, 3, 2]
    assert linear(CWICConfig(stripe={"q": 4})).sparsity.theta.shape == (2, 6)
    assert linear(CWICConfig()).sparsity.theta.shape == linear(CWICConfig(stripe={"k": 2})).sparsity.theta.shape == (1, 6)
    for config in (CWICConfig(stripe=3, uneven=True), CWICConfig(stripe={"q": 4}, statistics="released")):
        assert CWICConfig.from_json(config.to_json()) == config
    with pytest.raises(SparsityError, match="'stripes' is unknown"):
        CWICConfig.from_json({"stripes": 2})
