"""The rivals of the search's recipe at tiny size: their shares, their parts, and which of them is kept."""

import pytest
from compare_tiny import Checkpoint, bench_of, tied

from sparsity_lib import weights_per_token
from sparsity_lib.experiments import common, compare_rivals, compare_search
from sparsity_lib.experiments.compare_common import Point
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.sites import HEAD_IN, find_sites

CALIBRATION = {"tokens": 48, "length": 16}


@pytest.fixture(scope="module")
def model():
    return tied()


@pytest.fixture
def bench(model, monkeypatch):
    return bench_of(model, monkeypatch)


def designed(bench, point):
    return point.change.recipe.skipped(find_sites(bench.model), weights_per_token(bench.model), transforms=True)


def head_of(point):
    (rule,) = (rule for rule in point.change.recipe.rules if rule.site == HEAD_IN)
    return rule


@pytest.mark.parametrize("method", ["teal", "wina", "inputs_topk", "teal_greedy"])
def test_blocks_skip_what_the_head_leaves(bench, method):
    points = compare_rivals.beside(bench, method, (0.3, 0.5), (0.25, 0.5), CALIBRATION)
    assert [p.share for p in points] == [0.3, 0.5, 0.3, 0.5]
    for point, preview in zip(points, (0.25, 0.25, 0.5, 0.5), strict=True):
        assert designed(bench, point) == pytest.approx(point.share, abs=0.03)  # whole numbers of few inputs
        rule = head_of(point)
        assert rule.select.density == preview and isinstance(rule.transform, Rotate) and rule.repair
        point.change.check_fits(find_sites(bench.model))
        assert bench.shares(point)["skipped"] == pytest.approx(point.share, abs=0.06)  # what made-up text makes of thresholds


def test_a_head_read_once_has_the_blocks_density(bench):
    (point,) = compare_rivals.beside(bench, "inputs_topk", (0.4,), (None,), CALIBRATION)
    densities = [rule.select.density for rule in point.change.recipe.rules]
    assert densities == pytest.approx([densities[0]] * 5, abs=0.02) and not head_of(point).repair
    assert designed(bench, point) == pytest.approx(0.4, abs=0.02)


def test_dense_blocks_leave_all_to_the_head(bench):
    near, far = compare_rivals.alone(bench, (0.01, 0.9), CALIBRATION)
    assert designed(bench, near) == pytest.approx(0.01, abs=0.005) and [r.site for r in near.change.recipe.rules] == [HEAD_IN]
    assert far.change is None and "cannot be skipped" in far.about["reason"]


def test_a_head_that_skips_more_by_itself_is_no_rival(bench):
    points = compare_rivals.beside(bench, "wina", (0.02, 0.5), (0.25,), CALIBRATION)
    assert [p.share for p in points] == [0.5]
    low, high = compare_rivals.kept(bench, points, {"shares": (0.02, 0.5)})
    assert low.change is None and "by itself" in low.about["reason"] and high is points[0]


def test_the_kept_preview_has_the_least_divergence_on_calibration_text(bench, monkeypatch):
    from sparsity_lib.evaluate.quality import evaluate

    asked = []
    monkeypatch.setattr(compare_rivals, "evaluate", lambda *a, **k: asked.append(a[2]) or evaluate(*a, **k))
    points = compare_rivals.beside(bench, "wina", (0.5,), (0.25, 0.9), CALIBRATION)
    params = {"shares": (0.5, 0.6), "judged": {"tokens": 32, "length": 16}, "judged_every": 1}
    refused = Point(0.5, None, {"reason": "no"})
    best, none = compare_rivals.kept(bench, [refused, *points, *points[:1]], params)
    found = evaluate(bench.model, {str(i): p.change for i, p in enumerate(points)}, asked[0])
    kls = [found[str(i)].divergence().value for i in range(2)]
    assert best is points[kls.index(min(kls))] and none.change is None and asked[0].shape == (2, 16)


def test_every_rival_is_measured_once_a_model(bench, monkeypatch):
    text = {"tokens": 32, "length": 16, "seed": 1}
    for module, values in ((compare_search, {"COSTS": text, "JUDGED": text, "FITTED": text, "SHARES": (0.3,),
                                             "bench_for": lambda name, text: bench}),
                           (compare_rivals, {"COSTS": text, "JUDGED": text, "SHARES": (0.3, 0.5), "PREVIEWS": (0.25,),
                                             "bench_for": lambda name, text: bench})):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    best = {"rotate": "head", "score": "magnitude", "head": "refined", "refine": 0.05, "allocation": "spread"}
    monkeypatch.setattr(compare_search, "current", lambda: best)
    data, params, _ = compare_rivals.run(Checkpoint())
    own = data[common.MODELS[0]]
    assert list(own["methods"]) == ["dense_again", "teal_again", "wina_again", "inputs_topk_again", "teal_greedy_again",
                                    "inputs_topk_head", "teal_greedy_head"]
    assert all(len(points) == 2 for points in own["methods"].values()) and params["candidate"] == best
    assert compare_rivals.neither(best) == {"rotate": "head", "score": "magnitude", "head": "inputs", "allocation": "uniform"}
    assert [row["share"] for row in own["neither"]] == [0.3]
    assert [row["candidate"]["refine"] for row in own["words"]] == list(compare_rivals.WORDS)
    assert all("quality" in row for row in [*own["neither"], *own["words"]])
