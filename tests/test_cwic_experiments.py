"""CWIC's experiments at toy size: runs end, resume and stop as they should, and what they keep opens again."""

import dataclasses
import json
import math

import pytest
import torch
from core_tiny import tiny, tokens

from sparsity_lib import SparsityError, results
from sparsity_lib.accounting import account
from sparsity_lib.cwic import CWICConfig, convert, registry_of, shipped
from sparsity_lib.cwic.budget import active, flops
from sparsity_lib.errors import AssetError
from sparsity_lib.evaluate.quality import evaluate, evaluate_other
from sparsity_lib.experiments import cwic_ablations, cwic_common, cwic_small
from sparsity_lib.fit import fit
from sparsity_lib.install import installed
from sparsity_lib.methods.teal import teal

TOY = {"model": "small-llama", "text": {"sequences": 2, "length": 32}, "stripe": cwic_small.stripes(64), "steps": 12, "batch": 1,
       "length": 32, "rate": 3e-3, "final": 2.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cwic_common, "work_folder", lambda params: tmp_path / "work")
    real = shipped.folder_of
    monkeypatch.setattr(shipped, "folder_of", lambda name: tmp_path / "models" / real(name).name)
    return tmp_path


def silent(*words, **options):
    pass


def timeless(found):
    return {name: value for name, value in found.items() if name != "seconds"}


@pytest.mark.parametrize("loss", ["active", "flops"])
def test_a_run_passes_its_milestones_and_is_plain_data(loss, folder):
    found = cwic_common.run_of(cwic_common.spec(loss=loss, **TOY, watch=True), silent)
    assert json.loads(json.dumps(found)) == found
    assert [p["at"] for p in found["milestones"]] == ["2x", "end"] and found["stopped"] is None
    assert found["tokens"] == 12 * 32 and len(found["curve"]["kl"]) == 2
    last = found["milestones"][-1]
    assert last["ratio"] > 1 and set(last["density"]) == {"q", "k", "v", "o", "gate", "ffn", "head"}
    assert all(len(rows) == 5 for rows in last["channels"].values()) and len(last["head"]) == 16
    assert all(0 <= v <= 1 for v in last["head"])
    assert not (folder / "work").exists()


def test_a_killed_run_goes_on_to_the_same_end(folder, monkeypatch):
    params = cwic_common.spec(**TOY)
    params["train"]["checkpoint"] = 2
    whole = cwic_common.run_of(params, silent)
    real, calls = cwic_common._Points.__call__, []

    def killed(self, record, model):
        real(self, record, model)
        calls.append(record.step)
        if record.step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(cwic_common._Points, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        cwic_common.run_of(params, silent)
    monkeypatch.setattr(cwic_common._Points, "__call__", real)
    assert (folder / "work" / "milestones.json").exists()
    assert timeless(cwic_common.run_of(params, silent)) == timeless(whole)


def test_a_loss_that_is_not_finite_ends_a_run_with_what_it_had(folder, monkeypatch):
    from sparsity_lib.cwic import train as module

    real = module._Objective.__call__

    def broken(self, model, batch, step):
        return real(self, model, batch, step) * (math.nan if step == 11 else 1.0)

    monkeypatch.setattr(module._Objective, "__call__", broken)
    found = cwic_common.run_of(cwic_common.spec(**TOY, keep="small-llama-cwic-3x"), silent)
    assert found["stopped"] == 11 and [p["at"] for p in found["milestones"]] == ["2x"]
    assert "files" not in found and found["tokens"] == 11 * 32


@pytest.mark.parametrize("make", [active, flops])
def test_milestones_are_where_the_target_passes(make):
    budget = make(600, final=6.0)
    found = cwic_common.milestones(budget, 600)
    assert list(found.values()) == ["2x", "3x", "4x", "5x", "6x", "end"]
    for step, name in found.items():
        if name != "end":
            ratio = int(name[0]) + budget.margin
            assert budget.target(step) >= ratio - 1e-9 and budget.target(step - 1) < ratio
    assert cwic_common.milestones(dataclasses.replace(budget, warmup=0), 600)[0] == "2x"


def test_every_run_of_the_experiments_is_allowed_and_distinct():
    for runs in (cwic_small.runs(), cwic_ablations.runs()):
        assert len({json.dumps(params, sort_keys=True) for params in runs.values()}) == len(runs)
        for params in runs.values():
            cwic_common.recipe_of(params)
            convert(tiny("llama"), CWICConfig(**params["config"]))
            assert set(params["config"]) <= {f.name for f in dataclasses.fields(CWICConfig)}


def test_a_kernel_functions_run_is_the_unchanged_one_but_for_the_kernel():
    runs = cwic_ablations.runs()
    assert "kernel" not in runs["active 0"]["config"]  # or items of before would be made again
    for kernel in ("triangle", "gaussian"):
        plain = {**runs["active 0"], "config": {**runs["active 0"]["config"], "kernel": kernel}}
        assert runs[f"{kernel} kernel 0"] == plain


def test_models_with_their_own_heads_are_compared():
    dense, other, ids = tiny("llama"), tiny("llama", seed=1), tokens(3, 9)
    found = evaluate_other(dense, other, ids, batch_size=2)
    with torch.no_grad():
        own, wanted = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (other, dense))
    nll = -own.gather(-1, ids[:, 1:, None])[..., 0].sum(1)
    assert found.nll == pytest.approx(nll.tolist(), rel=1e-4)
    assert found.kl == pytest.approx((wanted.exp() * (wanted - own)).sum((1, 2)).tolist(), rel=1e-3)
    assert evaluate_other(dense, dense, ids).nll == pytest.approx(evaluate(dense, {}, ids)["dense"].nll)
    with pytest.raises(SparsityError, match="vocabularies"):
        evaluate_other(dense, tiny("llama", vocab_size=70), ids)


def test_teal_is_asked_for_a_ratio_of_the_whole_model():
    model, ids = tiny("llama"), tokens(8, 16)
    plan = fit(teal(cwic_small.density_at(1.5, model)), model, ids=ids)
    with installed(model, plan):
        assert 1 / (1 - account(model, ids=ids).skipped) == pytest.approx(1.5, rel=0.02)


def test_kept_models_open_again_and_damage_is_noticed(folder, monkeypatch):
    params = cwic_common.spec(**TOY, keep="small-llama-cwic-3x")
    files = cwic_common.run_of(params, silent)["files"]
    thresholds = cwic_common.run_of(cwic_common.spec(**TOY, mode="thresholds", keep="smollm2-cwic-2x"), silent)["files"]
    assert list(thresholds) == [shipped.FILE]
    listed = results.Result("cwic_small", {"files": {"small-llama-cwic-3x": files, "smollm2-cwic-2x": thresholds}}, {})
    real = results.load
    monkeypatch.setattr(shipped.results, "load", lambda name: listed if name.startswith("cwic") else real(name))
    model, tokenizer = shipped.load_shipped("small-llama-cwic-3x")
    assert registry_of(model).config.stripe["q"] == 64 and tokenizer("a").input_ids
    monkeypatch.setitem(shipped.SHIPPED, "smollm2-cwic-2x", shipped.Shipped("cwic_smol", "small-llama", True))
    model, _ = shipped.load_shipped("smollm2-cwic-2x")
    assert max(float(t.detach().max()) for t in registry_of(model).thresholds().values()) > 0
    place = shipped.folder_of("small-llama-cwic-3x") / "model.safetensors"
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    with pytest.raises(AssetError, match="damaged"):
        shipped.load_shipped("small-llama-cwic-3x")
    with pytest.raises(AssetError, match="does not list"):
        shipped.load_shipped("smollm2-cwic-3x")
    with pytest.raises(SparsityError, match="unknown"):
        shipped.load_shipped("smollm2")


def test_teal_and_smaller_dense_networks_are_measured_beside(folder, monkeypatch):
    text, calibration = {"sequences": 8, "length": 32}, {"tokens": 256, "length": 32}
    for way in ("uniform", "greedy", "head"):
        found = cwic_small.measure_teal({"teal": way, "ratios": (1.25, 3.0), "text": text, "calibration": calibration,
                                         "search": {"tokens": 64, "length": 32, "highest": 0.99}, "model": "small-llama"})
        assert [p["asked"] for p in found["points"]] == [1.25, 3.0]
        assert [p["ratio"] for p in found["points"]] == pytest.approx([1.25, 3.0], rel=0.1)
        assert sum(found["points"][0]["quality"]["kl"]) < sum(found["points"][1]["quality"]["kl"])
    recipe = dataclasses.replace(cwic_small.twin_recipe(), steps=4, warmup=1, batch=2)
    monkeypatch.setattr(cwic_small, "twin_recipe", lambda: recipe)
    monkeypatch.setattr(cwic_small, "work_folder", lambda params: folder / "twin")
    twin = cwic_small.train_twin({"twin": "3x", "widths": cwic_small.TWINS["3x"], "text": text, "model": "small-llama"})
    assert twin["ratio"] == pytest.approx(3.0, rel=0.02) and len(twin["quality"]["nll"]) == 8
    assert twin["tokens"] == 4 * 2 * 512 and json.loads(json.dumps(twin)) == twin
