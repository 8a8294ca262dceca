"""Rows, curves and verdicts of the CWIC chapters from made-up runs, whose answers are known."""

import html.parser

import numpy as np
import pytest
from test_benchmarks_result import coin, result_of

from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.groups import resolve
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments import cwic_patterns_report as patterns
from sparsity_lib.experiments import cwic_report as report
from sparsity_lib.experiments import cwic_slips as slips
from sparsity_lib.experiments import cwic_time_report as clock
from sparsity_lib.experiments import cwic_verdicts as rules
from sparsity_lib.experiments.cwic_ablations import ABLATIONS
from sparsity_lib.figures import cwic as figures
from sparsity_lib.figures import token_page
from sparsity_lib.verdicts import DIRECTION, NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED

SEQUENCES, TOKENS = 24, 10
NOISE = np.random.default_rng(0).normal(0, 0.2, SEQUENCES)


def sums(extra, kl=None):
    """A quality of `extra` nats a token above a loss of 5, and as much KL if not said otherwise."""
    kl = extra if kl is None else kl
    return {"nll": (TOKENS * (5 + extra) + NOISE).tolist(), "kl": (TOKENS * kl * (1 + 0.1 * NOISE)).tolist(),
            "agree": [5.0] * SEQUENCES, "tokens": [TOKENS] * SEQUENCES}


def run(cost, stopped=None, last=6.05):
    """A schedule whose loss rises by `cost` nats for each ratio; a little less at the end."""
    ratios = [r for r in (2.0, 3.0, 4.0, 5.0, 6.0) if r <= last]
    points = [{"at": f"{r:g}x", "step": int(100 * r), "ratio": r, "batch_ratio": r, "quality": sums(cost * (r - 1))}
              for r in ratios]
    points.append({"at": "end", "step": 700, "ratio": last, "batch_ratio": last, "quality": sums(cost * (last - 1.3))})
    return {"milestones": points, "stopped": stopped, "tokens": 100, "curve": {
        name: [1.0, 2.0] for name in ("step", "ratio", "target", "kl", "head_ratio", "loss")}}


def teal(cost):
    points = [{"asked": r, "ratio": r, "quality": sums(cost * (r - 1) ** 2)} for r in (1.5, 2.0, 3.0, 4.0)]
    return {"points": points, "dense": sums(0.0)}


@pytest.fixture
def small():
    runs = {f"{loss} {seed}": run(cost) for loss, cost in (("active", 0.1), ("flops", 0.12)) for seed in range(3)}
    runs |= {"3x all": run(0.08, last=3.1), "3x thresholds": run(0.2, last=3.1), "3x lora": run(0.15, last=3.1)}
    twins = {name: {"ratio": r, "weights": int(1e6 / r), "quality": sums(0.4), "tokens": 9}
             for name, r in (("3x", 3.0), ("6x", 6.0))}
    return {"runs": runs, "teal": {"uniform": teal(0.3), "greedy": teal(0.25)}, "twins": twins}


@pytest.fixture
def ablations():
    found = {name: {str(seed): run(0.1) for seed in seeds} for name, (_, seeds, _) in ABLATIONS.items()}
    found["no stripes"] = {str(s): run(0.13) for s in range(3)}
    found |= {name: {str(s): run(0.09) for s in range(3)} for name in ("MSE of hidden states", "bandwidth 0.5")}
    found["flops, no warm-up"] = {"0": run(0.5, stopped=12), "1": run(0.5), "2": run(0.5)}
    found["flops, no head limit"] = {str(s): run(0.5) for s in range(3)}
    found["triangle kernel"], found["gaussian kernel"] = {"0": run(0.12)}, {"0": run(0.13)}
    found["eta sqrt(n) = 1"] = {"0": run(0.3, last=2.5)}
    return found


def test_losses_at_a_ratio_are_between_the_nearest_points(small):
    points = report.curve_points(small["runs"]["active 0"], small["teal"]["uniform"])
    found = report.at_ratio(points, 2.5)
    assert report.loss(found).value == pytest.approx(5.15 + NOISE.mean() / TOKENS)
    assert report.at_ratio(points, 1.0).nll == Quality.from_json(sums(0.0)).nll
    assert report.at_ratio(points, 6.1).nll == pytest.approx(points[-1]["quality"]["nll"])
    assert report.at_ratio(points, 6.5) is None and report.at_ratio(points[1:], 1.5) is None and report.at_ratio([], 2) is None


def test_rows_set_every_way_beside_the_better_teal(small):
    rows = report.rows(small, (3.0, 6.0))
    three = {row[1]: row for row in rows if row[0] == "3x"}
    assert set(three) == {"CWIC, active parameters", "CWIC, FLOPs", "CWIC, to 3x", "thresholds alone, to 3x",
                          "thresholds and LoRA, to 3x", "TEAL, the better allocation"}
    assert three["CWIC, active parameters"][3].value == pytest.approx(0.2)
    assert three["CWIC, active parameters"][4] is None  # nothing is known of TEAL with the head
    assert three["TEAL, the better allocation"][3].value == pytest.approx(1.0)
    assert {row[1] for row in rows if row[0] == "6x"} == {"CWIC, active parameters", "CWIC, FLOPs"}
    frontiers = report.frontiers(small)
    assert [r for r, _ in frontiers["smaller dense"]] == [3.0, 6.0] and frontiers["TEAL"][0][0] == 1.0
    figures.frontier({"small-llama": frontiers})
    figures.training(report.training_curves(small, {"active 0": "active", "flops 0": "FLOPs", "none": "none"}))
    assert report.twin_rows(small)[0][4].value == pytest.approx(0.2)


def test_teal_with_the_head_is_a_row_a_curve_and_a_rival_of_its_own(small):
    own = report.HEADED
    both = report.beside_head(small, {"head": teal(0.2), "head, training text": teal(0.18)})
    assert "head" not in small["teal"] and own not in report.frontiers(small) and own in report.frontiers(both)
    figures.frontier({"small-llama": report.frontiers(both)})
    names = [row[1] for row in report.rows(both) if row[0] == "3x"]
    assert names[-1] == own and names[-2].startswith("TEAL") and report.text_gap(both).value == pytest.approx(-0.08, rel=0.1)
    plain, headed = (rules.verdict_teal(both, "small", "CWIC, active parameters", head=head) for head in (False, True))
    assert headed.number < plain.number and headed.claim.endswith("TEAL with the head")
    assert len(rules.small_verdicts(both)) == len(rules.small_verdicts(small)) + 1
    by_name = {row[1]: row for row in report.rows(both) if row[0] == "3x"}
    assert by_name["CWIC, active parameters"][4].value == pytest.approx(0.2 - 0.72, rel=0.1)  # the better text's
    assert by_name[own][4:] == [None] and by_name["TEAL, the better allocation"][4].value == pytest.approx(1.0 - 0.72, rel=0.1)


def test_rates_are_compared_with_thresholds_alone_where_both_are(small):
    smol = {"runs": {"thresholds 3x": run(0.2, last=2.95)}, "teal": small["teal"]}
    rows = report.rate_rows({"all 1e-05": run(0.3, last=3.05), "lora 0.0001": run(0.1, last=2.5)}, smol)
    assert rows[0][:3] == ["all weights", "1e-05", "2.95x"] and rows[0][4].value == pytest.approx(0.195 - 0.0195, rel=0.5)
    assert rows[1][0] == "low-rank adapters" and rows[1][3:] == [None, None]


def test_a_run_that_ends_just_below_a_ratio_is_compared_where_it_ends(small):
    small["runs"]["3x thresholds"] = run(0.2, last=2.95)
    rows = [row for row in report.rows(small, (3.0,)) if row[1] == "thresholds alone, to 3x"]
    assert [row[0] for row in rows] == ["2.95x"] and rows[0][3].value == pytest.approx(0.2 * (2.95 - 1.3), rel=0.1)
    found = rules.verdict_teal(small, "small", "thresholds alone, to 3x")
    assert found.outcome != "not testable here" and "2.95x" in found.experiment
    small["runs"]["3x thresholds"] = run(0.2, last=2.8)
    assert rules.verdict_teal(small, "small", "thresholds alone, to 3x").outcome == "not testable here"
    assert not [row for row in report.rows(small, (3.0,)) if row[1] == "thresholds alone, to 3x"]


def test_ablations_are_paired_with_what_is_unchanged(ablations):
    assert report.times_kl(report.ablation(ablations, "no stripes", 3.0)).value == pytest.approx(1.3)
    assert report.ablation(ablations, "flops, no warm-up") is None
    assert report.ablation(ablations, "eta sqrt(n) = 1", 3.0) is None
    rows = {row[0]: row for row in report.ablation_rows(ablations, report.of_loss("active"))}
    assert rows["nothing"][4] is None and rows["no stripes"][5].value == pytest.approx(1.3)
    assert rows["no stripes"][6].value == pytest.approx(45.8 - 47.5) and rows["head limit"][6] is None
    assert report.ablation_rows(ablations, ["flops, no warm-up"])[0][3] is None


def test_verdicts_follow_from_the_numbers(small, ablations):
    product = {"stripes_over_columns": {"0.333": [1.0, 1.02, 0.99] * 5}, "points": [
        {"kept": 1 / 3, "way": way, "times_as_fast": [fast] * 15} for way, fast in (("columns", 3.0), ("stripes", 2.6))]}
    bench = {"product": product, "decoding": {"3x imposed": {
        "ratio": 3.0, "times_as_fast": [1.4, 1.5, 1.6] * 5, "bandwidth": 4e9, "bytes": {"dense": 3e6, "granular": 1e6},
        "times": {"dense": {"median_us": 1000.0}, "granular": {"median_us": 500.0}}}}}
    smol = {"runs": {"thresholds 2x": run(0.4, last=2.1), "thresholds 3x": run(0.4, last=3.0), "lora 3x": run(0.3, last=2.6),
                     "all 6x": run(0.3)}, "teal": {"uniform": teal(0.3), "greedy": teal(0.25)}}
    limit = {str(seed): run(0.5) for seed in range(3)}
    found = {v.claim: v for v in rules.all_verdicts(small, ablations, smol, bench, limit)}
    assert len(found) == len(rules.all_verdicts(small, ablations, smol, bench, limit))
    outcomes = {
        "A1, small-llama, CWIC, active parameters": REPRODUCED, "A1, SmolLM2, thresholds and LoRA, to 3x": NOT_TESTABLE,
        "A2, 3x imposed": DIRECTION, "A3, 3x": REPRODUCED, "A3, 6x": NOT_REPRODUCED, "A4, small-llama": REPRODUCED,
        "A5": REPRODUCED, "A6": NOT_REPRODUCED, "A13, 0.05": REPRODUCED, "A13, 0.5": NOT_REPRODUCED,
        "A13, momentum 0.9": REPRODUCED,
        "A13, triangle kernel": REPRODUCED, "A13, gaussian kernel": NOT_REPRODUCED, "A14, active parameters": NOT_REPRODUCED,
        "A2, one product in stripes": REPRODUCED, "A15": NOT_REPRODUCED,
        "A16": REPRODUCED, "A17": NOT_TESTABLE, "F1": REPRODUCED, "F3, warm-up": NOT_TESTABLE, "F3, head limit": REPRODUCED,
        "F2": NOT_TESTABLE}
    assert {claim: found[claim].outcome for claim in outcomes} == outcomes
    assert [found[f"A13, {k} kernel"].number for k in ("triangle", "gaussian")] == pytest.approx([-20, -30])
    early = {**ablations, "triangle kernel": {"0": run(0.1, last=2.5)}}
    again = {v.claim: v for v in rules.all_verdicts(small, early, smol, bench, limit)}
    assert again["A13, triangle kernel"].outcome == NOT_TESTABLE
    assert [cell.value for cell in clock.decoding_rows(bench["decoding"])[0][2:]] == pytest.approx([1.5, 75, 50])


def test_agreement_heads_and_vocabulary_of_made_up_masks():
    wave = np.arange(40) % 10 * 10
    assert patterns.agreement([wave, wave, wave]).value == pytest.approx(1.0)
    noise = np.random.default_rng(0).integers(0, 100, (4, 400))
    assert abs(patterns.agreement(noise).value) < 0.1
    top = patterns.brightest([[100, 95, 10], [90, 80, 99]])
    assert (top.value, top.low, top.high) == (95, 90, 100)
    heads = np.repeat([[10, 90, 20, 80]], 3, 0).repeat(10, 1)
    share, chance = patterns.by_head(heads, 4)
    assert share.value == pytest.approx(1.0) and chance == pytest.approx(3 / 39)
    share, chance = patterns.by_head(np.random.default_rng(1).integers(0, 100, (30, 64)), 4)
    assert share.value == pytest.approx(chance, abs=0.03)
    assert patterns.along_vocabulary({"head": np.linspace(1, 0, 20)}).value == pytest.approx(-1)


def test_questions_are_told_apart_by_a_permutation():
    generator = np.random.default_rng(0)
    easy, hard = generator.normal(95, 5, 80), generator.normal(100, 5, 80)
    gap, chance = patterns.by_difficulty({"ARC-Easy": {"read": easy}, "ARC-Challenge": {"read": hard}})
    assert gap.high < 0 and gap.value == pytest.approx(-5, abs=2) and chance < 0.001
    gap, chance = patterns.by_difficulty({"ARC-Easy": {"read": easy}, "ARC-Challenge": {"read": easy}})
    assert gap.value == 0 and chance == 1


def test_kinds_are_set_beside_all_else():
    texts = [{"first": [5.0, 1], "other": [100.0 * n, 10 * n], "filler": [40.0, 5]} for n in (1, 2, 3)]
    found = patterns.beside_other(texts, "filler")
    assert found.value == pytest.approx(-20) and found.low == pytest.approx(-20)
    assert patterns.beside_other(texts, "template") is None


def made_views(layers=6):
    generator = np.random.default_rng(0)
    channels = {role: generator.integers(0, 100, (layers, 32)).tolist() for role in ("q", "k", "v", "o", "gate")}
    density = {role: generator.uniform(0.2, 0.5, layers).tolist() for role in patterns.ROLES}
    own = {"density": {**density, "head": [0.3]}, "channels": channels, "heads": 4, "head": np.linspace(0.5, 0.1, 12).tolist(),
           "occurrences": [10] * 12, "ratio": 3.0, "gates": {"0": channels["gate"]}}
    arc = {c: {"read": generator.normal(100, 5, 30).tolist(), "tokens": [60] * 30} for c in ("ARC-Easy", "ARC-Challenge")}
    texts = [{"first": [5.0, 1], "other": [100.0, 10], "punctuation": [16.0, 2], "filler": [27.0, 3]}] * 3
    return {"frequencies": own, "arc": arc, "kinds": {"texts": texts}}


def test_every_view_has_its_rows_verdicts_and_figures():
    data = {"a": made_views(), "b": made_views(5)}
    gates = {"gate": np.eye(5, 8).tolist()}
    trained = {"milestones": [{"step": 100, "channels": gates}, {"channels": gates}]}
    found = {v.claim: v for v in patterns.verdicts(data, trained)}
    assert found["A12, punctuation, a"].outcome == REPRODUCED and found["A7, training"].number == pytest.approx(1.0)
    assert found["A10, a"].outcome == REPRODUCED and found["A8, b, dip"].outcome == NOT_TESTABLE
    assert found["A7, a, always"].outcome == NOT_REPRODUCED and found["A7, a, always"].number < -10
    assert len(patterns.density_rows(data, "a")) == 7 and len(patterns.arc_rows(data)) == 2
    assert [row[0] for row in patterns.kind_rows(data, "a")] == ["first", "punctuation", "filler"]
    figures.by_layer({m: v["frequencies"]["density"] for m, v in data.items()})
    figures.vocabulary({m: v["frequencies"] for m, v in data.items()})
    figures.questions({m: v["arc"] for m, v in data.items()}, {"a": 300, "b": 300})
    figures.maps({"x": data["a"]["frequencies"]["channels"]["o"]}, xlabel="c", ylabels={"x": "layer"}, edges=8)


class Reader(html.parser.HTMLParser):
    """Counts elements and sees that all that is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_of_tokens_is_whole_and_says_more_than_colours():
    tokens = [["<b>", 30, "first"], [" a", 10, "filler"], ["\n", 50, "punctuation"], ["x", 20, "other"], ["y", 20, "other"]]
    reader = Reader()
    text = token_page.page([{"prompt": 2, "tokens": tokens}], 100, "a & b")
    reader.feed(text)
    assert not reader.open and "<b>" not in text and "a &amp; b" in text
    options = [attrs for tag, attrs in reader.seen if attrs.get("role") == "option"]
    assert [a["class"] for a in options] == ["level4", "level1", "level5", "level2", "level2"]
    assert options[2]["data-say"].startswith("↵: reads 50.0% of the weights, level 5 of 5 (punctuation)")
    assert {a["tabindex"] for a in options} == {"-1"} and any(a.get("aria-live") == "polite" for _, a in reader.seen)
    assert sum(tag == "td" for tag, _ in reader.seen) == 6 * 5
    assert "http" not in text.replace("http-equiv", "") and "prefers-color-scheme: dark" in text and "forced" not in text
    with pytest.raises(SparsityError, match="nothing to show"):
        token_page.fragment([], 1, "x")


def test_slips_are_found_in_the_printed_tables():
    rows = {row[0]: row[2] for row in slips.slip_rows()}
    assert "245 million" in rows["active parameters, table 1"] and "47.5" in rows["active parameters, table 1"]
    assert "37.9" in rows["FLOPs, table 3, MMLU"] and "-1" in rows["both, section 3.3"]
    table = {row[0]: row[1:] for row in slips.published_rows()}
    assert table["3.05x"][1].value == 32.8 and table["4.05x"][1] is None
    assert table["2.05x"][3].value == pytest.approx(53.6, abs=0.2)
    assert table["3.05x"][4].value == 51.5


def test_tasks_are_paired_with_dense_and_with_teal_at_the_same_ratio():
    outcomes = {"dense": 0.6, "smollm2-cwic-3x": 0.5, "teal 3x": 0.3}
    data = {name: {"ratio": 3.0, "result": result_of({task: coin(400, p, 7) for task in resolve("cwic6")}).to_dict()}
            for name, p in outcomes.items()}
    rows = {row[0]: row[2:] for row in report.task_rows(data, list(outcomes), "cwic6")}
    assert rows["dense"][1:] == [None, None] and rows["teal 3x"][2] is None
    assert rows["smollm2-cwic-3x"][1].value == pytest.approx(-10, abs=4)
    assert rows["smollm2-cwic-3x"][2].value == pytest.approx(20, abs=5)
    assert rules.verdict_tasks(data, "cwic6").outcome == REPRODUCED
    data["dense"] = {"ratio": 1.0, "result": result_of({task: coin(400, 0.45, 7) for task in resolve("cwic6")}).to_dict()}
    assert set(rules.GUESSED) == set(resolve("cwic6")) and rules.CHANCE == pytest.approx(1 / 3)
    poor = rules.verdict_tasks(data, "cwic6")
    assert poor.outcome == NOT_TESTABLE and "points ahead of guessing" in poor.because


def test_an_ablation_says_nothing_where_its_runs_say_nothing(ablations):
    """Below its end alone, and between milestones that lie close."""
    back = run(0.3)
    back["milestones"][-1]["ratio"] = 2.4
    jump = run(0.3)
    jump["milestones"] = [{**jump["milestones"][0], "ratio": 1.0}, jump["milestones"][-1]]
    assert report.of_run(back, 2.4) and report.of_run(back, 3.0) is None
    assert report.of_run(jump, 3.0) is None and report.of_run(jump, 6.05) and report.of_run(run(0.3), 3.0)
    same = {**ablations, "flops, no stripes": ablations["flops"]}
    found = {v.claim: v for v in rules.ablation_verdicts(same)}["F4, stripes"]
    assert found.outcome == NOT_TESTABLE and "never came to bear" in found.because


def test_the_heads_limit_is_judged_along_the_whole_schedule(small):
    limit = {str(seed): run(0.5) for seed in range(3)}
    (found,) = rules.limit_verdicts(small, limit)
    assert found.outcome == REPRODUCED and found.number == pytest.approx(0.5 / 0.12) and "3 seeds" in found.experiment
    limit["1"] = run(0.5, stopped=3)
    assert rules.limit_verdicts(small, limit)[0].outcome == NOT_TESTABLE


def test_kl_bends_by_the_ratio_that_each_version_counts(small):
    for seed in range(3):
        for point in small["runs"][f"flops {seed}"]["milestones"]:
            point["quality"] = sums(0.02 * max(0.0, point["ratio"] - 4.5) ** 2 + 0.01 * point["ratio"])
    found = {v.claim: v for v in rules.small_verdicts(small)}
    assert found["A14, FLOPs"].outcome == REPRODUCED and found["A14, active parameters"].outcome == NOT_REPRODUCED
    for seed in range(3):
        small["runs"][f"flops {seed}"] = run(0.1, last=4.6)
    assert rules.verdict_bend(small, "flops", "FLOPs").outcome == NOT_TESTABLE
