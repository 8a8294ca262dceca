"""The comparison's experiments at tiny size, and what they count."""

import pytest
import torch
from compare_tiny import IDS, Checkpoint, bench_of, granular, tied
from core_tiny import HIDDEN, LAYERS, VOCABULARY, WIDTH, tiny

from sparsity_lib import Plan, Recipe, Rule, SparsityError, account, find_sites, fit, installed, recipes, weights_per_token
from sparsity_lib.cwic import registry_of
from sparsity_lib.experiments import (
    common,
    compare_granular,
    compare_protocol,
    compare_quality,
    compare_search,
    compare_speed,
    compare_tasks,
    compare_tasks_many,
)
from sparsity_lib.experiments.compare_common import EVERY_METHOD, density_at, maker
from sparsity_lib.ops import library
from sparsity_lib.overheads import Overheads, overheads
from sparsity_lib.parts.repairs import LowRank
from sparsity_lib.parts.select import TopK
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.style import LOOKS


@pytest.fixture(scope="module")
def model():
    return tied()


@pytest.fixture
def bench(model, monkeypatch):
    return bench_of(model, monkeypatch)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_has_a_look_and_reaches_the_share_it_is_asked_for(bench, method):
    assert method in LOOKS
    found = bench.points(method, (0.1, 0.2, 0.995))
    rows = compare_quality.measured(bench, found, 1)["points"]
    assert "quality" not in rows[2] and rows[2]["reason"]
    for row in rows[:2]:
        off = 0.06 if method in ("nm", "gaussian", "gaussian_inputs") else 0.04  # few widths, few numbers for a quantile
        assert abs(row["shares"]["skipped"] - row["share"]) < off, (method, row["share"], row["shares"]["skipped"])
        assert len(row["quality"]["kl"]) == len(IDS) and Overheads.from_json(row["shares"]["extra"]).memory >= 0


def test_the_experiment_has_an_item_a_model_and_method(bench, monkeypatch):
    monkeypatch.setattr(compare_quality, "bench_for", lambda name, text: bench)
    monkeypatch.setattr(compare_quality, "EVERY_METHOD", ("cats", "wanda"))
    monkeypatch.setattr(compare_quality, "SHARES", (0.1,))
    monkeypatch.setattr(compare_quality, "EVERY", dict.fromkeys(common.MODELS, 2))
    checkpoint = Checkpoint()
    data, params, seeds = compare_quality.run(checkpoint)
    assert set(data) == set(common.MODELS) and len(checkpoint.seen) == 5 and params["shares"] == (0.1,)
    assert set(data[common.MODELS[0]]["methods"]) == {"cats", "wanda", "cwic"}
    assert set(data[common.MODELS[1]]["methods"]) == {"cats", "wanda"}  # no thresholds were trained for it


def test_granular_models_are_measured_as_the_rest(bench, monkeypatch):
    monkeypatch.setattr(compare_quality, "bench_for", lambda name, text: bench)
    found = compare_quality.granular({"model": "tiny", "text": {}, "shares": (0.5, 0.667), "every": 1})
    plain = compare_quality.measured(bench, bench.points("teal", (0.2,)), 1)
    assert found["dense"] == plain["dense"] and found["ids"] == plain["ids"]
    first, second = found["points"]
    for row in (first, second):
        model = granular(row["share"])
        registry = registry_of(model)
        thresholds = sum(t.numel() for t in registry.thresholds().values()) / registry.dense  # read for every token
        assert row["shares"]["skipped"] == pytest.approx(account(model, ids=IDS[:2]).skipped - thresholds)
        assert row["shares"]["skipped"] > 0.1
        extra = Overheads.from_json(row["shares"]["extra"])
        thetas = [layer.sparsity.theta for layer in registry_of(model).layers.values()]
        assert extra.tensor_bytes == 4 * (sum(t.numel() for t in thetas) + 2 * sum(t.shape[-1] for t in thetas))
        assert extra.dense_operations == 2 * weights_per_token(bench.model) and extra.copy_bytes == 4 * HIDDEN * VOCABULARY
    assert sum(second["quality"]["kl"]) > sum(first["quality"]["kl"]) > 0
    assert compare_granular.at_share(found["points"], 0.5).to_json() == first["quality"]
    assert compare_granular.at_share(found["points"], 0.6) is None


def test_rotations_are_paid_from_the_budget(bench):
    """What a rotation reads is no share skipped, and the methods' shares are met all the same."""
    for method, rotations in (("larosa", 2 * LAYERS), ("larosa_head", 2 * LAYERS + 1), ("teal", 0)):
        shares = bench.shares(bench.points(method, (0.2,))[0])
        paid = rotations * HIDDEN**2 / weights_per_token(bench.model)
        assert shares["rotations_free"] - shares["skipped"] == pytest.approx(paid)
        assert shares["skipped"] == pytest.approx(0.2, abs=0.04)


def test_methods_are_made_by_name_and_others_refused(model):
    assert maker("wina_head")(0.5).rules[-1].site == "head_in"
    with pytest.raises(SparsityError, match="teel"):
        maker("teel")
    with pytest.raises(SparsityError, match="cannot be skipped"):
        density_at("gaussian", 0.9, model, IDS)


def test_griffins_share_counts_its_dense_half(bench):
    (point,) = bench.points("griffin", (0.1,))
    with installed(bench.model, point.change):
        assert account(bench.model, ids=IDS).skipped == pytest.approx(0.1, abs=0.01)


def test_overheads_are_counted_by_hand(model):
    nothing = overheads(None, model)
    assert (nothing.tensor_bytes, nothing.copy_bytes, nothing.choosing, nothing.products) == (0, 0, 0, 0)
    assert nothing.memory == nothing.operations == 0 and nothing.dense_operations == 2 * weights_per_token(model)
    cats = overheads(recipes.cats(0.5), model)  # a size and a comparison a neuron, one number a layer
    assert cats.choosing == LAYERS * 2 * WIDTH and cats.tensor_bytes == LAYERS * 4 and cats.copy_bytes == 0
    rotated = overheads(Recipe("r", (Rule("up_in", TopK(0.5), transform=Rotate()),)), model)
    assert rotated.products == 2 * LAYERS * HIDDEN**2 and rotated.tensor_bytes == 4 * LAYERS * HIDDEN**2
    assert rotated.choosing == LAYERS * (HIDDEN + 31 * HIDDEN)
    low = overheads(Recipe("l", (Rule("down_in", TopK(0.5), repair=(LowRank(0.25),)),)), model)
    numbers = LAYERS * round(0.25 * HIDDEN) * (HIDDEN + WIDTH)
    assert low.tensor_bytes == 4 * numbers and low.products == 2 * numbers
    refined = recipes.with_head(recipes.cats(0.5), 0.5, refine=0.1)
    head = overheads(refined, model)
    assert head.copy_bytes == 4 * HIDDEN * VOCABULARY and head.products == 2 * round(0.1 * VOCABULARY) * HIDDEN
    assert head.choosing == cats.choosing + HIDDEN + 31 * HIDDEN + 31 * VOCABULARY
    own = tiny("llama")  # not tied: its rows are read where words are refined, and nowhere else
    assert overheads(recipes.with_head(recipes.cats(0.5), 0.5), own).copy_bytes == 0
    assert overheads(refined, own).copy_bytes == 4 * HIDDEN * VOCABULARY
    griffin = overheads(recipes.griffin(0.5), model)  # chosen once a prompt
    assert griffin.choosing == griffin.products == griffin.tensor_bytes == 0
    assert Overheads.from_json(cats.to_json()) == cats


def test_what_a_part_needs_no_text_for_is_fitted_once_for_all_densities(model):
    from sparsity_lib import fit_many

    plans = fit_many([recipes.rsparse(d, rank_share=0.2) for d in (0.4, 0.6)], model, ids=IDS)
    name = "0.up_in.left_0"
    assert plans[0].tensors[name].data_ptr() == plans[1].tensors[name].data_ptr()
    assert isinstance(plans[0], Plan) and find_sites(model).head.role == "head" and fit(recipes.cats(0.5), model, ids=IDS)


@pytest.fixture
def small_search(bench, monkeypatch):
    """The search with three choices of parts at the blocks, on little text."""
    text = {"tokens": 32, "length": 16, "seed": 1}
    for name, value in {"FITTED": text, "COSTS": text, "JUDGED": text, "SHARES": (0.3,), "ALONG": (0.2, 0.3),
                        "TEXT": {"sequences": 3, "length": 16},
                        "AROUND": (0.1, 0.2, 0.3), "BLOCKS": tuple(compare_search.BLOCKS[i] for i in (0, 3, 8, 12, 13))}.items():
        monkeypatch.setattr(compare_search, name, value)
    monkeypatch.setattr(compare_search, "bench_for", lambda name, text: bench)


def test_the_search_looks_at_calibration_text_only(bench, small_search, monkeypatch):
    from sparsity_lib.assets import texts

    own, roles = texts.token_sequences, []
    monkeypatch.setattr(texts, "token_sequences", lambda tokenizer, role, **o: roles.append(role) or own(tokenizer, role, **o))
    bench.ids = None  # the evaluation text
    rows = compare_search.searched(Checkpoint())[common.MODELS[0]]
    assert rows and set(roles) == {"calibration"} and bench.ids is None


def test_the_search_judges_every_candidate_and_tries_the_best_without_its_parts(bench, small_search):
    data, params, _ = compare_search.run(Checkpoint())
    rows = data["models"][common.MODELS[0]]["search"]
    ranked = [r for r in rows if "select" not in r["candidate"]]
    assert len(ranked) == 6 + 4 + 3 + 2 and len(rows) == len(ranked) + 3 * 4
    assert all(abs(r["shares"]["skipped"] - 0.3) < 0.05 for r in ranked if "quality" in r)
    counted = [r for r in rows if "select" in r["candidate"] and "quality" in r]
    assert counted and all("head_in" in r["shares"]["sites"] for r in counted)
    own = data["models"][common.MODELS[1]]["held out"]
    assert "chosen" in own and len(own) >= 3 and torch.equal(bench.ids, IDS)
    assert {label: len(each["points"]) for label, each in own.items()} == {label: 1 + (label == "chosen") for label in own}
    assert all(each["candidate"] != data["chosen"] for label, each in own.items() if label != "chosen")


def test_the_chosen_candidate_has_the_least_mean_log_divergence(monkeypatch):
    def row(share, kl, skipped=None, **candidate):
        return {"candidate": candidate, "share": share, "shares": {"skipped": share if skipped is None else skipped},
                "quality": {"nll": [1.0], "kl": [kl], "agree": [1.0], "tokens": [1]}}

    monkeypatch.setattr(compare_search, "SHARES", (0.4,))
    found = {"a": [row(0.4, 0.1, head="x"), row(0.4, 0.2, head="y"), {"candidate": {"head": "z"}, "reason": "no", "share": 0.4}],
             "b": [row(0.4, 0.9, head="x"), row(0.4, 0.2, head="y"), row(0.4, 0.01, head="z")]}
    # made for 40%, thresholds skip more here: half way up in the logarithm, 0.1, is what they cost at 40%
    slack = [row(0.3, 0.01, 0.35, select="threshold"), row(0.4, 1.0, 0.45, select="threshold")]
    ((candidate, (kl,)),) = compare_search.kl_of_candidates(slack, (0.4,))
    assert candidate == {"select": "threshold"} and kl == pytest.approx(0.1)
    assert compare_search.kl_of_candidates(slack, (0.5,)) == [(candidate, [None])]
    assert compare_search.chosen(found) == {"head": "y"}
    with pytest.raises(SparsityError, match="No candidate"):
        compare_search.chosen({"a": [{"candidate": {"head": "z"}, "reason": "no", "share": 0.4}]})
    assert set(compare_search.ablations({"rotate": "ffn", "score": "magnitude", "head": "refined", "allocation": "spread"})) == {
        "without rotation", "rotation at the head only", "without refined words", "without the head", "without the shared budget"}


def test_the_defaults_are_what_the_kept_search_chose():
    """The recipe that users get, and the pages describe, is the stored search's."""
    best = compare_search.current()
    assert recipes.combined(0.5) == recipes.combined(0.5, **compare_search.parts_of(best)) and best["allocation"] == "spread"


def test_protocol_changes_one_thing_at_a_time(bench, monkeypatch):
    monkeypatch.setattr(compare_protocol, "bench_for", lambda name, text: bench)
    found = {}
    for method in ("teal", "griffin"):
        changes = [{"token_share": share} for share in (1.0, 0.5, 0.25) if method == "teal" or share < 1]
        params = {"model": "tiny", "method": method, "share": 0.1, "effect": "tokens", "changes": changes, "text": {}, "every": 1}
        found[method] = compare_protocol.measure(params)
    whole, half, quarter = found["teal"]
    assert half["shares"]["skipped"] == pytest.approx(whole["shares"]["skipped"] / 2, rel=0.2)
    assert sum(whole["quality"]["kl"]) > sum(half["quality"]["kl"]) > sum(quarter["quality"]["kl"]) > 0
    assert half["recipe"]["token_share"] == 0.5 and len(found["griffin"]) == 2
    assert [len(each) for each in compare_protocol.settings().values()][0] == 4


def test_the_usual_protocol_begins_every_effect_and_is_measured_once(monkeypatch):
    monkeypatch.setattr(compare_protocol, "measure", lambda params: [
        {"change": change, "measured": (params["effect"], str(change))} for change in params["changes"]])
    checkpoint = Checkpoint()
    data, _, _ = compare_protocol.run(checkpoint)
    changes = [str(sorted(change.items())) for params in checkpoint.seen for change in params["changes"]
               if params["model"] == common.MODELS[0] and params["method"] == "teal"]
    assert len(changes) == len(set(changes))
    own = data[common.MODELS[0]]["teal"]
    for effect, wanted in compare_protocol.settings().items():
        assert [row["change"] for row in own[effect]] == wanted and compare_protocol.usual(wanted[0])
        assert sum(compare_protocol.usual(change) for change in wanted) == 1
        assert own[effect][0]["measured"] == ("tokens", "{'token_share': 1.0}")
    assert [row["change"]["token_share"] for row in data[common.MODELS[0]]["griffin"]["tokens"]] == [0.5, 0.1]


@pytest.mark.skipif(library.path() is None, reason="no compiled library")
def test_all_methods_of_a_share_are_timed_in_the_same_rounds_or_refused_by_name(bench, monkeypatch):
    read = type("Read", (), {"bytes": 1, "__call__": lambda self, turn: None})
    monkeypatch.setattr(compare_speed, "ReadBandwidth", read)
    monkeypatch.setattr(compare_speed, "SHARES", {"tiny": (0.1, 0.9)})
    fits, points = [], bench.points
    monkeypatch.setattr(bench, "points", lambda method, *a, **k: fits.append(method) or points(method, *a, **k))
    methods = ("cats", "teal_head", "larosa_head", "griffin", "gaussian", "rsparse", "wanda", "spread")
    params = {"model": "tiny", "share": 0.1, "methods": methods, "trained": [0.5], "prompt": 8, "builds": 2, "candidate": BEST,
              "head_every": 1, "costs": {"tokens": 32, "length": 16, "seed": 1}, "calibration": {"tokens": 64, "length": 16}}
    monkeypatch.setattr(compare_speed, "bench_for", lambda name, text: bench)
    made = {}
    rows = {row["method"]: row for row in compare_speed.together(made, params)}
    assert list(rows) == [*methods, "cwic"]
    for method in ("cats", "teal_head", "larosa_head", "griffin", "gaussian", "rsparse", "spread", "cwic"):
        found = rows[method]
        assert [len(each) for each in found["ratios"]] == [16 - 8 - compare_speed.WARMUP] * 2
        assert found["dense"] == rows["cats"]["dense"]
        less = found["bytes"]["sparse"] < found["bytes"]["dense"]
        assert less or method in ("larosa_head", "rsparse", "spread")  # what is as wide as these layers reads more than it saves
        assert found["skipped"] == pytest.approx(0.1, abs=0.04) or method == "cwic"  # of a token that is decoded
    assert "reason" in rows["wanda"]
    again = {row["method"]: row for row in compare_speed.together(made, {**params, "share": 0.9, "trained": []})}
    assert "cannot be skipped" in again["cats"]["reason"] and len(fits) == len(set(fits)) == len(methods) - 1
    assert [compare_speed.asked(m, 0.2) for m in ("griffin", "cats", "larosa_head", "wanda", "spread")] == [0.1, *[0.2] * 4]


BEST = {"rotate": "ffn", "score": "magnitude", "head": "refined", "allocation": "spread"}


def test_tasks_are_scored_for_the_dense_model_and_every_method(bench, monkeypatch):
    monkeypatch.setattr(compare_tasks, "bench_for", lambda name, text: bench)
    monkeypatch.setattr(compare_tasks, "run_benchmarks", lambda *a, **k: type("R", (), {"to_dict": lambda self: {"n": 1}})())
    monkeypatch.setattr(compare_granular, "run_benchmarks", compare_tasks.run_benchmarks)
    monkeypatch.setattr(compare_tasks, "METHODS", ("cats", "spread"))
    monkeypatch.setattr(compare_tasks, "COSTS", {"tokens": 32, "length": 16, "seed": 1})
    monkeypatch.setattr(compare_tasks, "current", lambda: dict(BEST))
    fits = []
    monkeypatch.setattr(compare_search, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    checkpoint = Checkpoint()
    data, params, _ = compare_tasks.run(checkpoint)
    rows = data[common.MODELS[0]]
    assert [r["method"] for r in rows] == ["dense", "cats", "cats", "spread", "spread", "cwic", "cwic", *["spread"] * 2]
    assert params["candidate"] == BEST and [r.get("part") for r in rows[-3:]] == [None, *compare_tasks.WITHOUT]
    assert "reason" in rows[2] and rows[3]["skipped"] == pytest.approx(0.2, abs=0.04)
    assert len(fits) == 3 * len(common.MODELS)  # both shares of the candidate from one fit, and one for each part left out
    assert [p["candidate"]["head"] for p in checkpoint.seen if "candidate" in p][-3:] == ["refined", "inputs", "dense"]


def test_many_documents_are_scored_for_the_best_of_each_kind(bench, monkeypatch):
    monkeypatch.setattr(compare_tasks, "bench_for", lambda name, text: bench)
    asked = []
    monkeypatch.setattr(compare_tasks, "run_benchmarks", lambda *a, **k: asked.append((a[2], k["limit"])) or type(
        "R", (), {"to_dict": lambda self: {"n": 1}})())
    for name, value in {"COSTS": {"tokens": 32, "length": 16, "seed": 1}, "METHODS": ("dense", "cats", "wina_head"),
                        "current": lambda: dict(BEST)}.items():
        monkeypatch.setattr(compare_tasks_many, name, value)
    data, params, _ = compare_tasks_many.run(Checkpoint())
    rows = data[common.MODELS[0]]
    assert [(r["method"], r.get("part")) for r in rows] == [
        ("dense", None), ("cats", None), ("wina_head", None), ("spread", None), ("spread", "without refined words")]
    assert "reason" in rows[1] and rows[2]["skipped"] == pytest.approx(0.4, abs=0.04) and params["candidate"] == BEST
    assert set(asked) == {("scap7", 420)} and len(asked) == 4 * len(compare_tasks_many.MODELS)


def test_tasks_and_speed_wait_for_the_search(monkeypatch):
    monkeypatch.setattr(compare_search.results, "load", lambda name: (_ for _ in ()).throw(SparsityError(f"no result {name}")))
    for experiment in (compare_tasks, compare_tasks_many, compare_speed):
        with pytest.raises(SparsityError, match="no result compare_search"):
            experiment.run(Checkpoint())
