"""The measurements themselves: what is timed runs, and says the right thing about it."""

import pytest
import torch

from sparsity_lib import SparsityError, experiments, ops, results
from sparsity_lib.bench import decode, glu, gpu, matvec, scaling, timing
from sparsity_lib.book import scaling as page
from sparsity_lib.ops import library, reference

pytestmark = pytest.mark.skipif(library.path() is None, reason="no compiled library")


def test_cases_take_turns_and_warm_up_is_not_counted():
    calls = []
    times = timing.interleaved({"a": lambda turn: calls.append("a"), "b": lambda turn: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5 and {len(t.seconds) for t in times.values()} == {3}
    assert timing.Times((3.0, 1.0, 2.0)).median == 2.0
    assert timing.Times((3e-6, 1e-6, 2e-6)).to_json()["best_us"] == pytest.approx(1.0)


@pytest.mark.parametrize("format", matvec.FORMATS)
def test_a_product_is_measured(format):
    found = matvec.measure(format, 256, 128, (0.0, 0.5), rounds=3)
    assert found["best_dense"].startswith(("torch ", "llama.cpp ")) and found["bandwidth"] > 1e8
    assert [p["kept"] for p in found["points"]] == [128, 64]
    assert all(p["speedup"] > 0 and p["share_of_bandwidth"] > 0 for p in found["points"])
    assert "50%" in matvec.table("x", found)


@pytest.mark.parametrize("format", matvec.FORMATS)
def test_the_dense_products_of_others_compute_what_ours_do(format):
    """A baseline that computed something else would be no baseline."""
    weight, x = torch.randn(256, 128) / 128**0.5, torch.randn(1, 128)
    x = x if format == "float32" else x.bfloat16()
    exact = x.float() @ weight.T
    for name, case in matvec.dense_cases(format, [weight], x).items():
        error = (case(0).float().flatten() - exact.flatten()).abs().max()
        assert error < {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1, "int4": 0.5}[format], name


def test_ffn_blocks_are_measured_with_the_same_outcome(monkeypatch):
    monkeypatch.setattr(glu, "ROUNDS", 3)
    for masks in ("scattered", "clustered"):
        found = glu.shaped(64, 128, masks)
        assert found["speedup"] > 0 and found["bytes_allow"] == pytest.approx(1.5)
    block = glu._Block(torch.randn(96, 64) / 8, torch.randn(96, 64) / 8, torch.randn(64, 96) / 10, "silu")
    x = torch.randn(1, 64).bfloat16()
    ways = [block.eager(x), *([block.onednn(x)] if block.reordered else []), block.sparse(x, 96, None)]
    for way in ways[1:]:
        torch.testing.assert_close(way.float(), ways[0].float(), rtol=0.05, atol=0.02)


def test_the_kept_results_can_be_shown():
    for name, found in results.load("bench/decode").data.items():
        assert "bytes predict" in decode.table(name, found)
    for name, found in results.load("bench/matvec").data.items():
        assert matvec.table(name, found).count("bandwidth") == len(matvec.SPARSITIES)
    for name, found in results.load("bench/glu").data.items():
        assert "bytes allow" in glu.line(name, found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_is_refused_without_one():
    with pytest.raises(SparsityError, match="bench/gpu measures on a GPU.*no CUDA device"):
        experiments.EXPERIMENTS["bench/gpu"](None)
    assert "bench/gpu" not in experiments.runnable() and "bench/matvec" in experiments.runnable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_products_and_ffns_are_measured_on_a_gpu():
    for tokens in (1, 16):
        for found in (gpu.matvec("bfloat16", 512, 256, tokens, 3), gpu.ffn(256, 512, tokens, 3)):
            assert all(p["speedup"] > 0 and p["share_of_bandwidth"] > 0 for p in found["points"].values())


@pytest.mark.parametrize("tokens", [1, 4])
def test_what_is_timed_on_a_gpu_computes_what_it_says(tokens):
    """The same cases on this processor: dense ones the product, sparse ones the product with the masked x."""
    weight, x = torch.randn(96, 128).bfloat16().float() / 8, torch.randn(tokens, 128).bfloat16()
    cases, kept = gpu.matvec_cases([weight], x, "bfloat16")
    score = x.float().abs().amax(0)
    masks = {f"sparse {s}": score > (score.quantile(s) if s else -1) for s in gpu.SPARSITIES}
    if tokens == 1:
        masks["top-k 0.5"] = reference.keep(x, threshold=None, k=64)[0]
    assert set(cases) == {"torch linear", "ours dense", *masks}
    assert kept == {"ours dense": 128, **{name: int(mask.sum()) for name, mask in masks.items()}}
    for name, case in cases.items():
        torch.testing.assert_close(case(0).float(), (x.float() * masks.get(name, 1)) @ weight.T, rtol=0.01, atol=0.01)
    block = [torch.randn(*shape).bfloat16() / 8 for shape in ((96, 64), (96, 64), (64, 96))]
    x = torch.randn(tokens, 64).bfloat16()
    cases, kept = gpu.ffn_cases([block], x)
    assert 44 <= kept["sparse 0.5"] <= 48 and kept["ours dense"] == 96
    torch.testing.assert_close(cases["ours dense"](0).float(), cases["torch linear"](0).float(), rtol=0.05, atol=0.05)
    packed = [ops.pack(w, skip) for w, skip in zip(block, ("outputs", "outputs", "inputs"), strict=True)]
    if tokens == 1:
        assert torch.equal(cases["top-k 0.5"](0), ops.glu(x, *packed, activation="silu", k=48))
        threshold = float(reference.activate(x.float() @ block[0].float().T, "silu").abs().median())
        half = ops.glu(x, *packed, activation="silu", threshold=threshold)
        torch.testing.assert_close(cases["sparse 0.5"](0).float(), half.float(), rtol=0.02, atol=0.05)


def test_the_table_of_a_gpu_names_its_numbers():
    found = {"seconds": {"torch linear": 4e-5, "sparse 0.5": 2e-5, "copy": 1e-4}, "bandwidth": 3e12,
             "points": {"sparse 0.5": {"speedup": 2.0, "share_of_bandwidth": 0.8}}}
    text = gpu.table("bfloat16", found)
    assert "torch 40 us, a copy 3000 GB/s" in text and "20.0 us   2.00x    80% of the copy" in text


def test_sweeps_are_measured_by_processes():
    found = scaling.measure("processes", 1, tasks=2, products=2, size=16)
    assert found["span"] >= found["task"] > 0 and found["start"] > 0 and 0 < found["busy"] <= 1
    three = scaling.repeated("processes", 1, tasks=1, products=2, size=16, rounds=3)
    assert three["spans"] == sorted(three["spans"]) and three["span"] == three["spans"][1]
    points = {"1": {**found, "span": 2.0}, "4": {**found, "span": 2.5}}
    assert scaling.efficiency(points) == {1: 1.0, 4: 0.8} and "4 workers: 2.5 s, efficiency 80%" in scaling.table("dask", points)


def test_the_book_shows_how_sweeps_grow(monkeypatch):
    monkeypatch.setattr(results, "names", lambda: [])
    assert "make results R=bench/scaling" in page.loads()
    point = {"span": 2.0, "spans": [1.5, 2.0, 3.0], "task": 0.5, "busy": 0.9, "start": 1.0}
    found = results.Result(page.RESULT, {"dask": {"1": point, "4": {**point, "span": 5.0}}},
                           {"machine": {"cores": 2}, "params": {"tasks": 4, "workers": [1, 2, 4], "rounds": 3}})
    monkeypatch.setattr(results, "names", lambda: [page.RESULT])
    monkeypatch.setattr(results, "load", lambda name: found)
    text = page.loads()
    assert "2 cores allow 50% with 4 workers" in text
    rows = [line for line in text.splitlines() if line.startswith("| a Dask")]
    assert len(rows) == 2 and "2.00 [1.50, 3.00]" in rows[0] and "100" in rows[0] and "40.0" in rows[1]
