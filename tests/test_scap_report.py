"""Rows, figures and verdicts of the SCAP and TEAL chapters, from measurements made up by hand."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sparsity_lib import results
from sparsity_lib.evaluate.bench_result import BenchmarkResult, TaskResult, standard_error
from sparsity_lib.evaluate.groups import resolve
from sparsity_lib.experiments import EXPERIMENTS, teal_report
from sparsity_lib.experiments import scap_center_report as center
from sparsity_lib.experiments import scap_coverage_report as coverage
from sparsity_lib.experiments import scap_report as chapter
from sparsity_lib.experiments import scap_slips as slips
from sparsity_lib.figures import scap as figures

MODEL = "smollm2-135m-instruct"


def quality(kl, nll=20.0):
    kl = [float(k) for k in kl]
    return {"kl": kl, "nll": [nll + k for k in kl], "agree": [8.0] * len(kl), "tokens": [10] * len(kl)}


def point(ffn, kl, **target):
    kinds = ("gate",) if target["method"] == "cats" else ("up_in", "down_in")
    return {**target, "ffn": ffn, "skipped": ffn / 2, "sites": dict.fromkeys(kinds, ffn), "quality": quality(kl)}


def scap(up, down, kl):
    return point(2 / 3 * up + down / 3, kl, method="scap", up=up, down=down)


GRID = {MODEL: {"dense": quality([0, 0, 0, 0]), "points": [
    scap(0.5, 0.5, [3, 2, 3, 2]), scap(0.5, 0.0, [3, 4, 3, 4]), scap(0.0, 0.5, [1, 1, 1, 1]),
    point(1 / 3, [4, 3, 4, 3], method="cats", gate=0.5), point(0.6, [9, 9, 9, 9], method="cats", gate=0.9),
]}}


def text(row):
    return [str(cell) for cell in row]


def test_only_the_front_is_shown():
    rows = [text(row) for row in chapter.grid_rows(GRID)]
    assert [row[1] for row in rows] == ["dense", "CATS 50%", "CATS 90%", "SCAP 0/50%", "SCAP 50/50%"]  # 50/0 is beaten by 50/50
    assert rows[-1][2:6] == ["50.0", "50.0", "50.0", "25.0"] and rows[-1][-1].startswith("0.250")
    assert len(chapter.grid_rows(GRID, every=True)) == 6
    assert [len(points) for points in chapter.fronts(GRID)[MODEL].values()] == [2, 2]


def test_gaps_are_those_of_the_best_point_that_is_sparse_enough():
    (row,) = chapter.gap_rows(GRID)  # CATS at 60% is sparser than any of SCAP's points
    assert row[1] == "CATS 50%" and row[4].value == pytest.approx(0.25 - 0.35) and row[4].low == row[4].high
    assert row[5].value == pytest.approx(50 - 100 / 3)
    found = chapter.verdict_front(GRID, MODEL)
    assert found.outcome == "reproduced" and found.number == pytest.approx(50 / 3)
    groups = chapter.verdict_groups(GRID, MODEL)
    assert groups.number == pytest.approx(3.5) and groups.outcome == "reproduced"


def scores(values):
    names = resolve("scap7")
    tasks = {n: TaskResult(n, "test", 0, 9, {"acc": float(np.mean(values))}, {"acc": standard_error(tuple(values))},
                           tuple(range(len(values))), {"acc": tuple(values)}) for n in names}
    return BenchmarkResult(tasks, len(values), 0, "prefix", 1.0, "0").to_dict()


TASKS = {MODEL: [
    {"point": None, "shares": None, "result": scores([1.0, 1.0, 1.0, 0.0])},
    {"point": {"method": "cats", "gate": 0.7}, "shares": {"ffn": 0.46}, "result": scores([1.0, 0.0, 0.0, 0.0])},
    {"point": {"method": "scap", "up": 0.4, "down": 0.6}, "shares": {"ffn": 0.47}, "result": scores([1.0, 1.0, 0.0, 0.0])},
    {"point": {"method": "scap", "up": 0.2, "down": 0.4}, "shares": {"ffn": 0.27}, "result": scores([1.0, 1.0, 0.0, 0.0])},
]}


def test_tasks_are_compared_with_dense_and_at_an_equal_share():
    dense, cats, own, mild = chapter.task_rows(TASKS, "scap7")
    assert dense[1] == "dense" and dense[5:] == [None, None] and dense[3] == 75.0
    assert cats[5].value == pytest.approx(-100 * 50 / 75) and cats[6] is None  # the dense score is the denominator
    assert own[6].value == pytest.approx(25.0) and own[6].low < 25 < own[6].high and str(own[2]) == "47.0"
    assert mild[6] is None
    assert chapter.verdict_tasks(TASKS, MODEL, "scap7").number == pytest.approx(25.0)


def decoding(first, last, read=0.8):
    def at(ratio):
        return {"ratio": ratio, "bytes": {"dense": 1.0, "sparse": read}}

    return {"prompts": {"2048": at(last), "256": at(first)}}


DECODE = {MODEL: {"cats": decoding(1.2, 1.1), "scap": decoding(1.3, 1.2, 0.75)}}


def test_speeds_are_ratios_of_speeds():
    found = chapter.verdict_decode(DECODE, MODEL)
    assert found.low == pytest.approx(1.3 / 1.2) and found.high == pytest.approx(1.2 / 1.1) and found.outcome == "reproduced"
    assert chapter.verdict_length(DECODE, MODEL).outcome == "reproduced"
    kernel = chapter.verdict_kernel(DECODE, MODEL)
    assert kernel.low == pytest.approx(1.3 * 0.75 / (1.2 * 0.8)) and kernel.outcome == "reproduced"
    each = {n: {"ratio": 1.25, "bytes": {"dense": 1, "sparse": 0.8}} for n in ("256", "512", "1024", "2048")}
    rows = [text(row) for row in chapter.decode_rows({MODEL: {s: {"prompts": each} for s in ("cats", "scap")}})]
    assert rows[0][:3] == ["Mistral-7B, the paper", "CATS", "19.9"] and rows[2][1:] == ["CATS", *["25.0"] * 6]
    speed = slips.speed_rows(chapter.speeds(DECODE))
    assert text(speed[0])[1:] == ["1.178", "1.272", "1.080", "1.53"] and speed[1][3].value == pytest.approx((1.56 / 1.32) ** 0.5)


def test_which_printed_changes_have_the_wrong_denominator():
    rows = {(row[0], row[1]): row for row in slips.relative_rows()}
    assert len(rows) == 31
    worst = rows["Mistral-7B", "CATS 90%"]
    assert worst[-1] == "pruned" and worst[3].value == pytest.approx(-37.7, abs=0.05)
    assert worst[4].value == pytest.approx(-60.6, abs=0.05)
    assert [rows["Llama-2-7B", f"CATS {s}%"][-1] for s in (50, 70, 90)] == ["pruned"] * 3
    assert [rows["Mistral-7B", f"SCAP {s}%"][-1] for s in ("40/70", "50/80", "60/70")] == ["dense"] * 3
    assert rows["Mistral-7B", "CATS 50%"][-1] == "either"  # 1.48 and 1.50 both print as 1.5
    for printed in slips.TABLES:  # the means follow from the scores
        assert np.mean(printed.scores) == pytest.approx(printed.average, abs=0.1)
    assert [text(row)[-2:] for row in slips.centring_rows()] == [["44.7", "352"], ["19.8", "65"]]
    fake = slips.Printed("m", "x", 0.0, (50.0,), 50.0, -10.0)
    assert slips.denominator(fake, slips.Printed("m", "dense", 0.0, (100.0,), 100.0, None)) == "neither"


def shares(sparsity, ffn=None, linears=0.3):
    return {"sites": {"down_in": sparsity}, "ffn": sparsity if ffn is None else ffn, "linears": linears}


def ablated(scale, *sums):
    points = [{"method": "down", "down": s, "shares": shares(s), "loss": [loss * s / 0.3] * 4, "right": right}
              for s, loss, right in sums]
    return {"dense": {"weights": [1.0] * 4, "right": [1.0] * 4, "loss": [0.0] * 4}, "points": points, "scale": scale}


GOOD, BAD = [1.0] * 4, [1.0, 1.0, 0.0, 0.0]
ABLATION = {"net": {"none": ablated("share", (0.3, 1.0, GOOD), (0.5, 1.0, BAD), (0.7, 2.0, GOOD)),
                    "mode": ablated("share", (0.3, 0.5, GOOD), (0.5, 0.5, GOOD), (0.7, 0.5, GOOD))}}


def place(mode, std=1.0, layers=2):
    return {"edges": [-1.0, 0.0, 1.0], "shares": [[0.5, 0.5]] * layers, "mean": [0.0] * layers, "median": [0.0] * layers,
            "mode": [mode] * layers, "std": [std] * layers, "near_zero": [0.2] * layers, "near_mode": [0.4] * layers}


def test_centring_is_read_at_equal_loss():
    # uncentred the loss at 30% is 1; centred it is 0.5 there, 0.83 at 50% and 1.17 at 70%: equal at 60%
    assert center.gain(ABLATION["net"]).value == pytest.approx(0.3)
    none, mode = center.ablation_rows(ABLATION)
    assert str(none[5]) == "30" and none[6] is None and none[4].value == -50.0  # what is wrong at 50% ends the safe stretch
    assert str(mode[5]) == "70" and mode[6].value == pytest.approx(30.0)
    assert center.verdict_gain(ABLATION, "net").outcome == "reproduced"
    distributions = {"net": {"up_in": place(0.0), "down_in": place(-0.16, 0.2)}, "gated": {"down_in": place(0.001)}}
    assert center.verdict_centred(distributions, ["gated"]).outcome == "reproduced"
    assert center.verdict_centred(distributions, ["net"]).outcome == "not reproduced"
    assert text(center.distribution_rows(distributions)[1])[6] == "0.80"


COVERAGE = {
    "gemma3-270m": {"what": "decoder", "trained_here": False, "chosen": {"method": "scap", "up": 0.4, "down": 0.5},
                    "dense": {"right": GOOD, "weights": GOOD, "scale": "share"},
                    "tried": [{"point": {"method": "scap", "up": 0.4, "down": 0.5}, "right": GOOD, "scale": "share",
                               "shares": shares(0.43)}]},
    "small-vit": {"what": "vision", "trained_here": True,
                  "chosen": {"method": "scap", "up": 0.4, "down": 0.6, "attention": 0.4, "center": "mode"},
                  "dense": {"right": GOOD, "weights": GOOD, "scale": "share"},
                  "tried": [{"point": {"method": "scap", "up": 0.4, "down": 0.6, "attention": 0.4, "center": "mode"},
                             "right": [1.0, 1.0, 1.0, 0.0], "scale": "share", "shares": shares(0.6, linears=0.5)}]},
    "small-mamba2": {"what": "state space", "trained_here": True, "chosen": None, "tried": [],
                     "dense": {"right": [-10.0, -20.0], "weights": [10.0, 10.0], "scale": "log", "more": {"perplexity": 4.48}}},
}


def test_coverage_counts_what_was_targeted():
    gemma, vit, mamba = coverage.coverage_rows(COVERAGE)
    assert text(gemma) == ["Gemma", "decoder", "no", "100.0", "+0.0 [+0.0, +0.0]", "43", "up 40, down 50"]
    assert text(vit)[0] == "small-vit*" and text(vit)[5:] == ["50", "attention 40, up 40, down 60"]
    assert vit[4].value == -50.0  # the odd units only
    assert mamba[6] == "none of those tried" and coverage.met(COVERAGE["small-mamba2"]) == 0.0
    assert str(coverage.score(COVERAGE["small-mamba2"]["dense"])) == "4.5"
    assert coverage.verdict_coverage(COVERAGE).outcome == "not reproduced"  # one model reaches nothing
    rest = {name: found for name, found in COVERAGE.items() if found["chosen"]}
    assert coverage.verdict_coverage(rest).number == pytest.approx(43)
    assert coverage.verdict_coverage(rest).outcome == "reproduced"
    weak = {**rest["gemma3-270m"], "tried": [{**p, "shares": shares(0.2)} for p in rest["gemma3-270m"]["tried"]]}
    weakest = coverage.verdict_coverage({**rest, "gemma3-270m": weak})  # what the others reach does not lift it
    assert weakest.outcome == "direction only" and weakest.number == weakest.high == pytest.approx(20)
    assert coverage.verdict_tolerance(COVERAGE, "gemma3-270m").outcome == "reproduced"
    assert coverage.verdict_tolerance(COVERAGE, "small-vit").outcome == "not reproduced"


TARGETS = {MODEL: {"at once": {"0.4": {"piqa": {"down_in": [0.41, 0.45]}, "text of boolq": {"down_in": [0.40, 0.42]}}}}}


def test_targets_are_met_to_some_points():
    (row,) = coverage.target_rows(TARGETS)
    assert text(row) == [f"{chapter.short(MODEL)}, at once", "down_in, 40%", "42.0", "40.0", "45.0", "1.5"]
    points = coverage.target_points(TARGETS, MODEL, "at once")
    assert points[1] == [(0.4, "piqa", 0.45), (0.4, "text of boolq", 0.42)]
    found = coverage.verdict_targets(TARGETS, MODEL, "at once")
    assert found.outcome == "reproduced" and found.number == pytest.approx(-1.5)


def together(needed):
    return {"down_in": {"needed": needed, "each": [0.5] * len(needed), "by_chance": 0.9}}


BEAMS = {"beams": {"1": together([0.5, 0.4]), "8": together([0.8, 0.7])},
         "texts": {"1": together([0.5, 0.4]), "8": together([0.9])}}


def test_what_is_lost_to_beams_is_paired_by_text():
    found = coverage.lost(BEAMS, "beams", "8")
    assert found.value == pytest.approx(((1 - 0.2 / 0.5) + (1 - 0.3 / 0.6)) / 2)
    assert coverage.lost(BEAMS, "texts", "8").value == pytest.approx(1 - 0.1 / 0.55)
    rows = coverage.beam_rows(BEAMS, {"read": {"down_in": {"neighbours": {"8": 0.77}, "strangers": {"8": 0.88}}}})
    assert [text(row)[-1] for row in rows] == ["None", "77.0", "None", "88.0"] and str(rows[1][4]) == "25.0"
    assert coverage.verdict_beams(BEAMS).outcome == "reproduced"


def way(kl, **more):
    shares = {"0.5": {"linears": 0.5, "skipped": 0.4}}
    return {"quality": {"dense": quality([0, 0]), "0.5": quality(kl)}, "shares": shares, **more}


TEAL = {MODEL: {
    "uniform": way([2, 4]), "greedy": way([1, 3], levels={"0.5": {"qkv_in": [0.2, 0.4], "down_in": [0.6, 0.8]}}),
    "uniform, symmetric": way([2, 5], thresholds={"0.qkv_in": [1.0, 1.1], "1.qkv_in": [2.0, 2.0]}),
}}


def test_allocations_are_paired_with_the_uniform_one():
    uniform, greedy, symmetric = teal_report.rows(TEAL, (0.5,))
    assert uniform[-1] is None and greedy[-1].value == pytest.approx(-0.1) and symmetric[-1].value == pytest.approx(0.05)
    assert greedy[-1].low == pytest.approx(-0.1) and symmetric[-1].low == 0.0  # paired by sequence
    assert text(teal_report.level_rows(TEAL, 0.5)[1]) == [chapter.short(MODEL), "down_in", "70", "60", "80"]
    assert text(teal_report.threshold_rows(TEAL)[0])[2:] == ["1.050", "1.000", "1.100"]
    assert teal_report.verdict_greedy(TEAL, MODEL).outcome == "reproduced"


def test_every_figure_draws():
    figures.fronts(chapter.fronts(GRID), {MODEL: {"scap": [(0.3, 0.5)]}})
    figures.centring(center.curves(dict.fromkeys(("a", "b", "c"), ABLATION["net"])), {"a": "A"})
    drawn = figures.distributions({"net": {"up_in": place(0.0), "down_in": place(-0.2)}})
    assert [axes.get_visible() for axes in drawn.axes] == [True, False, True]
    figures.targets(coverage.target_points(TARGETS, MODEL, "at once"))
    figures.beams(BEAMS)
    figures.allocation(teal_report.curves(TEAL, (0.5,)))
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def test_every_kept_run_is_registered():
    names = {"scap_grid", "scap_tasks", "scap_center", "scap_coverage", "scap_targets", "scap_beams", "teal_allocation",
             "bench/scap_decode"}
    assert names <= EXPERIMENTS.keys()


def kept(name):
    if name not in results.names():
        pytest.skip(f"not run yet: make results R={name}")
    return results.load(name).data


def test_the_kept_grid_fills_its_tables():
    data = kept("scap_grid")
    assert chapter.grid_rows(data) and chapter.gap_rows(data) and all(chapter.verdict_groups(data, model) for model in data)
