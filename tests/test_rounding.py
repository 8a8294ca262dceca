"""A changed last bit: what is changed, what is measured, and what the page says of it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from distributed_tiny import scored

from sparsity_lib import results
from sparsity_lib.assets import load_tokenizer, model_path
from sparsity_lib.book import rounding as book
from sparsity_lib.experiments import rounding, rounding_report
from sparsity_lib.experiments.rounding import divergence, last_bit, measure

PARAMS = {"model": "tiny", "share": 0.001, "every": 2, "text": {"sequences": 2, "length": 32}, "draws": 2,
          "task": {"name": "piqa", "limit": 4}, "calibration": {"tokens": 256, "length": 64, "seed": 0}}


@pytest.fixture(scope="module")
def small():
    tokenizer = load_tokenizer(str(model_path("smollm2-135m-instruct")))
    return scored(tokenizer), tokenizer


def test_one_step_of_a_float_and_nothing_afterwards(small):
    model, _ = small
    embedding, ids = model.get_input_embeddings(), torch.arange(5, 50)[None]
    plain = embedding(ids)
    with last_bit(model, 0):
        changed = embedding(ids)
    with last_bit(model, 1):
        other = embedding(ids)
    step = (torch.nextafter(plain.abs(), torch.tensor(torch.inf)) - plain.abs()).detach()
    off = ((changed - plain).abs() / step).detach()
    assert 1 <= float(off[off > 0].min()) and float(off.max()) <= 2 and float((off > 0).float().mean()) > 0.9
    assert not torch.equal(changed, other) and torch.equal(embedding(ids), plain)


@pytest.mark.parametrize("method", rounding.METHODS)
def test_what_is_measured(small, monkeypatch, method):
    monkeypatch.setattr(rounding.common, "in_float32", lambda name: small)
    found = measure({**PARAMS, "method": method, "group": 16})
    assert len(found["layers"]) == 2 and found["tokens"] == [16, 16] and [len(draws) for draws in found["kl"]] == [3, 3]
    assert 0 < found["layers"][0] < 1e-5 and 0 < found["mean"] <= found["most"]
    assert 0 <= found["median"] <= found["most"], "half of the tokens may be predicted to the same float32"
    assert [len(each) for each in found["answers"]] == [4, 4]
    if method == "dense":
        assert found["kl"][0][0] == 0 and found["most"] < 1e-3 and found["agree"] == 1
        assert found["answers"][0] == found["answers"][1]
    else:
        assert min(draws[0] for draws in found["kl"]) > 0, "the masks change something"
    assert method in rounding.line("tiny", method, found)


def test_a_divergence_by_its_definition():
    one, other = torch.randn(2, 7, 5).log_softmax(-1)
    slow = sum(float(one[t, v].exp() * (one[t, v] - other[t, v])) for t in range(7) for v in range(5))
    assert divergence(one, other) == pytest.approx(slow, rel=1e-5) and divergence(one, one) == 0


def made(last=1e-6, kl=((2.0, 2.0), (2.0, 2.5)), after=(1.0, 0.0)):
    return {"layers": [1e-7, last], "mean": 1e-3, "median": 1e-4, "most": 0.5, "agree": 1.0, "kl": [list(k) for k in kl],
            "tokens": [10, 10], "answers": [[1.0, 1.0], list(after)]}


def test_rows_and_extremes(monkeypatch):
    data = {"smollm2-135m-instruct": {
        "dense": made(kl=((0, 0), (0, 0)), after=(1, 1)), "magnitude": made(after=(1, 1)),
        "teal": made(1e-2), "wina": made(1e-3, after=(0, 0))}}
    rows = rounding_report.rows(data)
    assert [row[1] for row in rows] == ["dense", "weight magnitude", "TEAL", "WINA"]
    assert {len(row) for row in rows} == {len(rounding_report.COLUMNS)}
    assert [str(cell) for cell in rows[2][2:]] == ["0.01", "0.0001", "0.5", "0.200", "0.025", "1"]
    found = rounding_report.extremes(data, "smollm2-135m-instruct", "by token")
    assert found == {"last": 1e-2, "fewest": 1, "changed": 2, "most": 0.5, "shift": pytest.approx(0.125), "gained": 100.0}
    assert rounding_report.extremes(data, "smollm2-135m-instruct", "none")["shift"] == 0
    monkeypatch.setattr(results, "names", lambda: [])
    assert "make results R=rounding" in book.summary()
    monkeypatch.setattr(results, "names", lambda: ["rounding"])
    kept = SimpleNamespace(data=data, manifest={"params": {"task": {"limit": 2}}})
    monkeypatch.setattr(results, "load", lambda name: kept)
    assert book.summary() == (
        "on SmolLM2 1 to 2 of 2 answers turn over, by method, and KL changes by at most 13% of itself")
    assert rounding_report.growth(data)["smollm2-135m-instruct"]["teal"] == [1e-7, 1e-2]


@pytest.mark.skipif("rounding" not in results.names(), reason="not measured")
def test_the_kept_result_shows_what_is_said_of_it():
    """Without masks and with fixed ones no answer changes; with masks by token some do, while the means stay."""
    data = results.load("rounding").data
    for model in rounding.SHARES:
        still, fixed, moving = (rounding_report.extremes(data, model, kind) for kind in ("none", "fixed", "by token"))
        assert still["changed"] == fixed["changed"] == 0 < moving["changed"]
        assert max(still["last"], fixed["last"]) < 1e-4 < moving["last"] and moving["shift"] < 0.1


def test_answers_that_one_engine_cannot_give_are_given_by_the_other(monkeypatch):
    """Both runs by the same: a difference of engines would pass for that of a bit."""
    asked = []

    def run_benchmarks(model, tokenizer, name, limit, backend):
        asked.append(backend)
        packed = backend == "prefix" and len(asked) != 2  # the second cannot be packed
        outcome = SimpleNamespace(values={"acc": [1.0, len(asked)]})
        return SimpleNamespace(backend="prefix" if packed else "hf", tasks={name: outcome})

    monkeypatch.setattr(rounding, "run_benchmarks", run_benchmarks)
    monkeypatch.setattr(rounding, "last_bit", lambda model, draw: nullcontext())
    assert rounding.answers(None, None, nullcontext, PARAMS["task"]) == [[1.0, 3], [1.0, 4]]
    assert asked == ["prefix", "prefix", "hf", "hf"]
    asked[:] = ["", ""]
    assert rounding.answers(None, None, nullcontext, PARAMS["task"]) == [[1.0, 3], [1.0, 4]] and len(asked) == 4
