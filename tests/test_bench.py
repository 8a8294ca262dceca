"""The measurements themselves: what is timed runs, and says the right thing about it."""

import pytest
import torch

from sparsity_lib import results
from sparsity_lib.bench import decode, glu, matvec, timing
from sparsity_lib.ops import library

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
