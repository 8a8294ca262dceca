"""The measurements of N:M pruning: they run, compute what they say, and refuse a machine that cannot do it."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsity_lib import SparsityError, experiments, ops
from sparsity_lib.bench import nm, nm_gpu
from sparsity_lib.ops import library

needs_library = pytest.mark.skipif(library.path() is None, reason="no compiled library")


def test_what_is_compared_with_prunes_alike():
    x = torch.randn(5, 96)
    for n, m in nm.PATTERNS:
        assert torch.equal(nm.by_torch(x, n, m), ops.nm_select(x, n, m))


@needs_library
def test_masks_products_and_prompts_are_measured(monkeypatch):
    monkeypatch.setattr(nm, "CALLS", 2)
    monkeypatch.setattr(nm, "TOKENS", 4)
    found = nm.masks(64, 2)
    assert set(found["many"]) < set(found["one"]) and all(us > 0 for way in found.values() for us in way.values())
    assert {f"inside {rule}" for rule in ("threshold", "topk", "2:4", "16:32")} <= set(found["one"])
    assert "16:32  ours" in nm.masks_table(64, found)
    product = nm.product(256, 64, 3)
    assert product["best_dense"].startswith("torch") and product["speedup"]["8:16"] > 0 and "all" not in product["saved_us"]
    assert "8:16" in nm.product_table("256 x 64", product, found)
    share = nm.prompt(8, 64, 64, 3)
    assert share["share"]["dense"] == 1 and "ours 2:4, repaired" in nm.prompt_table(share)


def test_a_mask_is_told_as_a_share_of_what_it_saves():
    times = {name: {"median_us": us} for name, us in (("torch linear", 90.0), ("all", 100.0), ("2:4", 60.0))}
    found = {"times": times, "best_dense": "torch linear", "speedup": {"all": 0.9, "2:4": 1.5}, "saved_us": {"2:4": 40.0}}
    assert "mask 1.25% of what it saves" in nm.product_table("x", found, {"many": {"ours 2:4": 0.5}})
    assert "mask" not in nm.product_table("x", found, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_is_refused_without_one():
    with pytest.raises(SparsityError, match="bench/nm_gpu measures on a GPU.*no CUDA device"):
        experiments.EXPERIMENTS["bench/nm_gpu"](None)
    assert "bench/nm_gpu" not in experiments.runnable() and "bench/nm" in experiments.runnable()


def test_rows_are_pruned_as_the_sparse_cores_expect():
    """torch's own compression, whose plain version runs anywhere, loses nothing of them; of 4 x 4 tiles it would keep less."""
    x = torch.randn(32, 64).bfloat16()
    pruned = nm_gpu.prune(x)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(pruned)), pruned)
    groups = x.view(-1, 4).abs()
    assert torch.equal(pruned.view(-1, 4).abs().sum(1), groups.topk(2).values.sum(1).bfloat16())
    assert ((pruned.view(8, 4, 16, 4) != 0).sum(1) > 2).any()  # along a column more than 2 of 4 may stay


def test_cases_and_their_table(monkeypatch):
    monkeypatch.setattr(nm_gpu, "compress", lambda x, backend: x)  # the dense product of what is pruned
    x, weight = torch.randn(8, 32), torch.randn(16, 32)
    found = nm_gpu.cases(x, weight, ("CUTLASS",))
    assert torch.equal(found["sparse, CUTLASS"](), ops.nm_select(x, 2, 4) @ weight.T)
    assert torch.equal(found["product, CUTLASS"](), found["sparse, CUTLASS"]()) and torch.equal(found["dense"](), x @ weight.T)
    assert torch.equal(found["mask 8:16"](), ops.nm_select(x, 8, 16))
    times = {"seconds": {"dense": 4e-5, "sparse, CUTLASS": 2e-5}, "speedup": {"dense": 1.0, "sparse, CUTLASS": 2.0}}
    assert "dense 40 us" in nm_gpu.table("x", times) and "2.00x" in nm_gpu.table("x", times)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_prefill_is_measured_on_a_gpu():
    found = nm_gpu.measure(256, 256, 64, 3)
    assert found["backends"] and all(found["speedup"][f"sparse, {name}"] > 0 for name in found["backends"])
