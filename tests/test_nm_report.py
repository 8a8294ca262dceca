"""Rows and verdicts of the N:M chapter on made-up numbers whose answers are known."""

import numpy as np
import pytest
import torch
from core_tiny import tiny

from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.benchmarks import BenchmarkResult, TaskResult
from sparsity_lib.experiments import (
    nm_common,
    nm_cost_report,
    nm_energy,
    nm_quality,
    nm_report,
    nm_task_report,
    nm_training,
    nm_verdicts,
)
from sparsity_lib.experiments.nm_common import point
from sparsity_lib.fit import fit
from sparsity_lib.parts.nm import NofM
from sparsity_lib.parts.select import TopK
from sparsity_lib.train.repairs import RepairRecipe

SEQUENCES = 6
KL = {"2:4": 0.54, "4:8": 0.4, "8:16": 0.27, "16:32": 0.2, "50%": 0.18, "30%": 0.9}


def quality(kl):
    grown = [kl * 10 * (1 + 0.02 * i) for i in range(SEQUENCES)]
    return {"nll": [30 + k for k in grown], "kl": grown, "agree": [5.0] * SEQUENCES, "tokens": [10] * SEQUENCES}


def made(p):
    """KL by pattern, twice that for weights, a fifth less with VAR."""
    factor = (2 if p["on"] == "weights" else 1) * (0.8 if p.get("repair") == ["var"] else 1)
    return {**p, "quality": quality(KL[p["pattern"]] * factor), "shares": {"skipped": 0.25}}


DATA = {"smollm2-135m-instruct": {"groups": {name: [made(p) for p in each] for name, each in nm_quality.groups().items()},
                                  "dense": quality(0.0)}}
MODEL = "smollm2-135m-instruct"


def test_every_point_is_buildable_and_named_once():
    points = [p for each in nm_quality.groups().values() for p in each]
    assert len({str(p) for p in points}) == len(points)
    for p in points:
        if p["on"] == "activations":
            assert nm_common.recipe_of(p).rules
        else:
            assert nm_common.pruning_of(p).score == p["score"]
    assert nm_common.recipe_of(point("4:8", sites=["v"])).rules[0].readers == ("v",)
    assert isinstance(nm_common.recipe_of(point("50%")).rules[0].select, TopK)
    assert nm_common.pruning_of(point("2:4", on="weights", score="wanda")).select == NofM(2, 4)
    assert nm_common.density("8:16") == 0.5 and nm_common.density("30%") == 0.3
    assert [nm_common.learned(p) for p in (point("2:4", transform="lpts"), point("2:4", repair=["var", "ls"]), point("2:4"))] == [
        True, True, False]
    with pytest.raises(SparsityError, match="activations"):
        nm_common.recipe_of(point("2:4", on="weights", score="wanda"))
    with pytest.raises(SparsityError, match="on"):
        point("2:4", on="head")


def test_points_are_found_by_what_they_do():
    assert nm_report.one(DATA, MODEL, "8:16")["quality"] == quality(0.27)
    assert nm_report.one(DATA, MODEL, "8:16", repair=["var"])["quality"] == quality(0.27 * 0.8)
    assert nm_report.one(DATA, MODEL, "8:16", on="weights", score="wanda")["quality"] == quality(0.54)
    with pytest.raises(KeyError):
        nm_report.one(DATA, MODEL, "8:16", repair=["none"])


def test_ratios_and_verdicts_are_those_of_the_numbers():
    assert nm_report.drops(DATA, MODEL, "2:4", "16:32").value == pytest.approx(2.7)
    outcome = {fine: nm_verdicts.verdict_ratio(DATA, MODEL, fine, size).outcome for fine, size in (("16:32", 2.7), ("4:8", 2.0))}
    assert outcome == {"16:32": "reproduced", "4:8": "direction only"}
    assert nm_verdicts.verdict_weights(DATA, MODEL).number == pytest.approx(2.0)
    repaired = nm_verdicts.verdict_repair(DATA, MODEL, repair=["var"])
    assert repaired.number == pytest.approx(-20) and repaired.outcome == "reproduced"
    assert nm_verdicts.verdict_repair(DATA, MODEL, transform="spts").outcome == "not reproduced"
    parity = nm_verdicts.verdict_parity(DATA, MODEL)  # 0.02 nats a token apart at 1% allowed
    assert parity.number == pytest.approx(-100 * 0.02 * np.mean([1 + 0.02 * i for i in range(SEQUENCES)]))
    assert parity.outcome == "not reproduced"


def test_rows_have_a_cell_for_each_column():
    assert {len(r) for r in nm_report.score_rows(DATA, nm_quality.SCORES)} == {4 + len(nm_quality.SCORES)}
    rows = nm_report.repair_rows(DATA, "8:16")
    assert [r[3].value for r in rows] == sorted(r[3].value for r in rows)
    assert sum(r[1] == "nothing" for r in rows) == 1 and {"VAR", "D-PTS + VAR", "Amber"} <= {r[1] for r in rows}
    weights = nm_report.weight_rows(DATA)
    assert {len(r) for r in weights} == {6} and all(r[5].value == pytest.approx(2) for r in weights)
    sites = nm_report.site_rows(DATA)
    assert len(sites) == 7 + 4 and sites[0][4].value == pytest.approx(sites[0][3].value / 25)


def test_costs_of_patterns_and_what_they_buy():
    assert nm_report.drops(DATA, MODEL, "2:4", "50%").value == pytest.approx(3)
    closed = nm_cost_report.gap_closed(DATA, MODEL, "8:16")
    assert closed.value == pytest.approx((0.54 - 0.27) / (0.54 - 0.18)) and closed.low == pytest.approx(closed.high)
    rows = nm_cost_report.trade_rows(DATA)
    assert [r[0] for r in rows] == list(nm_common.PATTERNS) and {len(r) for r in rows} == {6 + len(nm_cost_report.models(DATA))}
    assert [(r[2].value, r[3]) for r in rows] == [(1.5, 3), (3, 5), (5, 9), (7.5, 17)]
    assert all(1 < r[4].value < r[5].value < 2 for r in rows) and rows[0][6] is None
    points = nm_cost_report.trade_points(DATA)["bits"][MODEL]
    assert [p for p, *_ in points] == list(nm_common.PATTERNS) and points[2][2].value == pytest.approx(0.27 * 1.05)


def test_rows_of_measured_masks():
    patterns = nm_common.PATTERNS
    many = {f"{way} {p}": cost for way, cost in (("ours", 0.5), ("torch", 20.0)) for p in patterns}
    times = {rule: {"median_us": 60.0} for rule in ("threshold", "topk", *patterns)}
    product = {"times": times, "speedup": dict.fromkeys(times, 1.5), "saved_us": dict.fromkeys(times, 40.0)}
    share = {f"{way} {p}{more}": 0.04 for way, more in (("ours", ""), ("ours", ", repaired"), ("torch", "")) for p in patterns}
    masks = {width: {"many": many} for width in ("4096", "576")}
    bench = {"masks": masks, "products": {"14336 x 4096": product}, "prompt": {"share": share}}
    rows = nm_cost_report.product_rows(bench)
    assert [r[1] for r in rows] == ["threshold", "top-k", *patterns]
    assert rows[0][4:] == [None, None] and rows[2][5].value == pytest.approx(100 * 0.5 / 40)
    prompt = [[r[0], *(c.value for c in r[1:])] for r in nm_cost_report.prompt_rows(bench)]
    assert prompt == [[p, 4.0, 4.0, 4.0] for p in patterns]
    assert nm_cost_report.mask_points(bench)["torch"]["8:16"] == [(576, 20.0), (4096, 20.0)]


def task(name, right):
    values = {"acc": tuple(map(float, right))}
    return TaskResult(name, "test", 0, len(right), {"acc": float(np.mean(right))}, {"acc": 0.1}, tuple(range(len(right))), values)


def stored(*rights, beside=()):
    """One result for each list of outcomes of ARC-Challenge and of BoolQ; the tasks `beside` get all right."""
    results = []
    for arc, boolq in rights:
        tasks = {"arc_challenge": task("arc_challenge", arc), "boolq": task("boolq", boolq)}
        tasks |= {name: task(name, [1] * len(arc)) for name in beside}
        results.append({"scap7": BenchmarkResult(tasks, None, 0, "prefix", 1.0, "0").to_dict()})
    return results


def test_a_relative_drop_has_the_dense_score_as_its_denominator():
    dense, half = ([1] * 8 + [0] * 2, [1] * 6 + [0] * 4), ([1] * 4 + [0] * 6, [1] * 6 + [0] * 4)
    found = [{"ranked": r} for r in stored(dense, half)]
    drawn = nm_task_report.relative_drop(found, 1, "scap7")
    assert drawn[0] == pytest.approx(1 - 5 / 7) and len(drawn) == 2001
    only = nm_task_report.relative_drop(found, 1, "scap7", only=lambda name: name == "boolq")
    assert only[0] == 0 and abs(only).max() == 0
    interval = nm_task_report.spread(drawn)
    assert interval.low < interval.value < interval.high


def test_what_is_added_is_set_against_the_plain_pattern():
    right = [1] * 5
    dense, plain, var = (right, right), ([1, 1, 1, 1, 0], [1, 1, 0, 0, 0]), ([1, 1, 1, 0, 0], right)
    where = (None, point("8:16"), point("8:16", repair=["var"]))
    results = stored(dense, plain, var, beside=("winogrande", "piqa", "sciq", "hellaswag", "arc_easy"))
    found = [{"point": p, "ranked": r, "written": {}} for p, r in zip(where, results, strict=True)]
    rows = nm_task_report.added_rows({MODEL: found}, "scap7", "8:16")
    assert [row[1] for row in rows] == ["VAR", "nothing"] and rows[1][4:] == [None] * 3
    lost = 100 * (2 / 5) / 7
    changes = [100 * (3 / 5 - 1 / 5) / 7, -100 * (1 / 5) / 2, 100 * (3 / 5) / 2]
    assert [cell.value for cell in rows[0][2:]] == pytest.approx([100 - lost, lost, *changes])
    assert [row[1] for row in nm_task_report.task_rows({MODEL: found}, "scap7")] == ["dense", "activations 8:16"]
    verdict = nm_verdicts.verdict_var({MODEL: found}, MODEL, "scap7")
    assert verdict.number == pytest.approx(30) and verdict.outcome == "reproduced"


def test_ways_of_training_are_set_against_no_repair():
    usual = nm_report.one(DATA, MODEL, "8:16", repair=["ls"])
    groups = {name: [{**p, "before": [4.0], "after": [1.0]} if p == usual else p for p in each]
              for name, each in DATA[MODEL]["groups"].items()}
    other = {"quality": quality(0.54), "before": [1.0, 2.0, 2.0], "after": [1.0, 1.0, 3.0]}
    trained = {"ways": {"in other units": other}, "halves": {"scale": {"quality": quality(0.2)}}}
    rows = nm_report.training_rows({MODEL: {"groups": groups}}, trained, MODEL, "8:16")
    assert [row[0] for row in rows] == ["as in the tables above", "its scales alone", "in other units"]
    assert [None if row[1] is None else row[1].value for row in rows] == [25, None, 100]
    assert [row[3].value for row in rows] == pytest.approx([0, -0.07 * 1.05, 0.27 * 1.05])


def test_every_way_of_training_is_a_recipe():
    for changes in nm_training.WAYS.values():
        RepairRecipe(**{**nm_common.REPAIRS, **changes})
    assert nm_common.learned(nm_training.POINT)


def test_a_half_of_ls_is_what_was_trained_and_the_rest_what_it_was():
    model = tiny("llama")
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    plan = fit(nm_common.recipe_of(nm_training.POINT), model, ids=ids)
    for tensor in plan.tensors.values():
        tensor.add_(torch.rand_like(tensor))
    scales, offsets = (nm_training.half_of(plan, half).tensors for half in ("scale", "offset"))
    assert len(scales) == len(plan.tensors) > 0
    for name, tensor in plan.tensors.items():
        if ".scale_" in name:
            assert torch.equal(scales[name], tensor) and bool((offsets[name] == 1).all())
        else:
            assert ".offset_" in name and torch.equal(offsets[name], tensor) and not bool(scales[name].any())


def test_energy_kept_by_a_pattern():
    x = torch.tensor([[3.0, -4.0, 1.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
    assert nm_energy.retained(x, "2:4") == pytest.approx((9 + 16 + 1 + 1) / 32)
    assert nm_energy.retained(x, "50%") == pytest.approx((9 + 16 + 4 + 1) / 32)
    gaussian = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert nm_energy.kurtosis(gaussian) == pytest.approx(3, abs=0.1)


def test_pruned_weights_are_evaluated_and_given_back():
    from sparsity_lib.evaluate.quality import evaluate
    from sparsity_lib.weights import WeightPruning, pruned_weights

    model = tiny("llama")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    found = evaluate(model, {"half": lambda: pruned_weights(model, WeightPruning(NofM(2, 4), "magnitude"))}, ids)
    assert min(found["half"].kl) > 0 == max(found["dense"].kl)
    assert torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
