"""What times a training step of the granular product: the same work in every case, and figures that follow from the times."""

import pytest
import torch
from core_tiny import tiny, tokens

from sparsity_lib import SparsityError, experiments
from sparsity_lib.bench import cwic, cwic_train
from sparsity_lib.bench.device import cuda_device
from sparsity_lib.cwic import CWICConfig, convert, measure


def test_the_products_that_are_timed_compute_the_same():
    grad_y, found = torch.randn(20, 48, generator=torch.Generator().manual_seed(1)), {}
    for name, product in cwic_train.products(16).items():
        made = cwic_train.inputs_of(48, 40, 16, 20)
        cwic_train.step(product, made, grad_y)
        found[name] = [made[each].grad for each in cwic_train.LEARNING]
    for ours, plain in zip(found["ours"], found["plain"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert found["dense"][2] is None and found["ours"][2].any()


def test_a_measurement_says_times_and_memory():
    found = cwic_train.measure(32, 24, 8, tokens=10, rounds=3)
    times = {name: each["median_us"] for name, each in found["times"].items()}
    assert set(times) == {"dense", "plain", "ours"}
    assert found["over_plain"] == pytest.approx(times["plain"] / times["ours"])
    assert found["over_dense"] == pytest.approx(times["dense"] / times["ours"])
    assert found["saved"]["ours"] == 0 < 4 * 4 * 10 * 24 < found["saved"]["plain"]  # some tensors [tokens, stripes, in]
    assert 0.2 < found["density"] < 0.5
    assert "plain PyTorch" in cwic_train.line("q", found)


def test_the_gpus_measurement_asks_for_a_gpu():
    if torch.cuda.is_available():
        assert cuda_device("bench/cwic_gpu")
        return
    with pytest.raises(SparsityError, match="bench/cwic_gpu measures on a GPU.*no CUDA device"):
        experiments.EXPERIMENTS["bench/cwic_gpu"](None)
    assert "bench/cwic_gpu" not in experiments.runnable() and "bench/cwic_train" in experiments.runnable()


@pytest.mark.parametrize("ratio", [1.5, 2.5])
def test_imposed_thresholds_meet_a_ratio_whatever_was_there_before(ratio):
    ids, found = tokens(4, 24), []
    for before in (0.0, 1.5):
        model = tiny("llama").eval()
        registry = convert(model, CWICConfig(stripe={"q": 16, "gate": 12}))
        with torch.no_grad():
            for layer in registry.layers.values():
                layer.sparsity.theta.fill_(before)
        cwic.meet(model, registry, ids, ratio)
        assert measure(model, ids).ratio() == pytest.approx(ratio, rel=0.03)
        found.append({name: layer.sparsity.theta.clone() for name, layer in registry.layers.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
