"""Rows, points and verdicts of the comparison on made-up numbers whose answers are known."""

import numpy as np
import pytest

from sparsity_lib.evaluate.benchmarks import BenchmarkResult, TaskResult
from sparsity_lib.evaluate.groups import resolve
from sparsity_lib.experiments import compare_protocol_report as protocol_report
from sparsity_lib.experiments import compare_report as report
from sparsity_lib.experiments import compare_search_report as search_report
from sparsity_lib.experiments import compare_speed_report as speed_report
from sparsity_lib.experiments.compare_common import EVERY_METHOD
from sparsity_lib.figures import compare as figures
from sparsity_lib.overheads import Overheads

MODEL, SEQUENCES = "smollm2-135m-instruct", 6
EXTRA = Overheads(8, 0, 800, 5, 20, 1000).to_json()


def quality(kl):
    grown = [kl * 10 * (1 + 0.02 * i) for i in range(SEQUENCES)]
    return {"nll": [30 + k for k in grown], "kl": grown, "agree": [5.0] * SEQUENCES, "tokens": [10] * SEQUENCES}


def point(share, kl):
    shares = {"skipped": share, "sites": {"a": 0.5, "b": 0.7}, "ffn": 0.4, "linears": 0.3, "extra": EXTRA}
    return {"share": round(share, 1), "recipe": {}, "quality": quality(kl), "shares": shares}


def method_points(factor):
    return [point(0.1, 0.1 * factor), point(0.3, 0.4 * factor), {"share": 0.5, "reason": "too much"}]


FACTORS = {method: 1 + i / 10 for i, method in enumerate(EVERY_METHOD)} | {"oracle": 0.01, "larosa": 0.5, "teal_head": 0.4}
QUALITY = {MODEL: {"methods": {m: method_points(f) for m, f in FACTORS.items()}, "dense": quality(0.0), "ids": "x"}}
MEAN = np.mean([1 + 0.02 * i for i in range(SEQUENCES)])


def test_curves_are_log_linear_between_points_and_end_where_they_end():
    curve = report.curve(QUALITY, MODEL, "larosa")
    assert curve.kl_at(0.2).value == pytest.approx(np.sqrt(0.05 * 0.2) * MEAN)
    assert curve.kl_at(0.3).value == pytest.approx(0.2 * MEAN) and curve.at(0.305) is not None
    assert curve.at(0.4) is None and curve.at(0.05) is None
    assert report.Curve.of([{"share": 0.5, "reason": "no"}]) is None


def test_the_best_single_method_is_no_bound():
    assert report.best_single(QUALITY, MODEL, 0.3) == "teal_head"
    assert report.best_single(QUALITY, MODEL, 0.3, report.PUBLISHED) == "larosa"
    assert report.best_single(QUALITY, MODEL, 0.6) is None
    assert "oracle" not in report.SINGLE and "random" not in report.SINGLE


def test_rows_have_a_cell_a_column_and_none_where_nothing_was_reached():
    rows = report.quality_rows(QUALITY, (0.1, 0.3, 0.5))
    assert {len(r) for r in rows} == {5} and all(r[4] is None for r in rows)
    reach = report.reach_rows(QUALITY)
    assert reach[0][2].value == 30 and reach[0][3] == "too much"
    extra = report.extra_rows(QUALITY, 0.5)[0]
    assert [c.value for c in extra[2:5]] == [30, 1.0, 2.5]
    assert [c.value for c in report.counted_rows(QUALITY, 0.1)[0][2:]] == pytest.approx([60, 40, 30, 10])
    assert set(report.quality_points(QUALITY, ["cats"])[MODEL]) == {"cats"}


def test_the_same_masks_are_stated_in_every_count():
    def stated(share, kl, sites):
        counts = {"skipped": share, "sites": {"a": sites}, "ffn": 2 * share, "linears": 1.5 * share}
        return {**point(share, kl), "shares": counts}

    wide, narrow = [stated(0.1, 0.1, 0.1), stated(0.3, 0.4, 0.3)], [stated(0.1, 0.3, 0.4), stated(0.2, 0.9, 0.8)]
    pruned = [{**point(0.1, 0.2), "shares": {"skipped": 0.1}}]
    data = {MODEL: {"methods": {"teal": wide, "cats": narrow, "wanda": pruned}}}
    assert report.curve(data, MODEL, "cats", "sites").shares.tolist() == [0.4, 0.8]
    assert report.curve(data, MODEL, "wanda", "sites") is None
    rows = report.recounted_rows(data, 0.3, ("cats", "wanda"))
    assert rows[0][2] is None and rows[0][5] is None, "outside of what was measured"
    rows = report.recounted_rows(data, 0.1, ("teal", "cats", "wanda"))
    assert [cell.value for cell in rows[0][2:]] == pytest.approx([1] * 4)
    assert rows[1][2] is None and [cell.value for cell in rows[1][3:]] == pytest.approx([3, 3, 3])
    assert rows[2][2:5] == [None] * 3 and rows[2][5].value == pytest.approx(2)
    counts = ("sites", "skipped")
    found = report.counted_points(data, ("teal", "wanda"), counts)
    assert [x for x, _ in found[MODEL]["sites"]["teal"]] == [0.1, 0.3] and found[MODEL]["sites"]["wanda"] == []
    assert figures.counted(found, report.COUNTS) is not None


SHARES = (0.2, 0.3)
BEST = {"rotate": "ffn", "score": "magnitude", "head": "refined", "allocation": "spread"}
SEARCH = {"chosen": BEST, "models": {MODEL: {
    "search": [{"share": s, "candidate": BEST, "quality": quality(0.1)} for s in SHARES]
    + [{"share": s, "candidate": {**BEST, "head": "dense"}, **({"quality": quality(0.05)} if s < 0.3 else {"reason": "no"})}
       for s in SHARES],
    "held out": {"chosen": {"candidate": BEST, "points": [point(s, 0.08) for s in SHARES]},
                 "without rotation": {"candidate": BEST, "points": [point(0.2, 0.16), {"share": 0.3, "reason": "no"}]}}}}}


def test_what_the_search_gains_is_a_paired_ratio():
    best, ratio = search_report.over_best(SEARCH, QUALITY, MODEL, 0.3)
    assert best == "teal_head" and ratio.value == pytest.approx(0.08 / 0.16) and ratio.low == pytest.approx(ratio.high)
    assert search_report.verdict_search(SEARCH, QUALITY, MODEL, 0.3).outcome == "reproduced"
    worse = {**SEARCH, "models": {MODEL: {**SEARCH["models"][MODEL], "held out": {"chosen": {"points": [point(0.3, 0.15)]}}}}}
    assert search_report.verdict_search(worse, QUALITY, MODEL, 0.3).outcome == "direction only"
    assert search_report.verdict_search(SEARCH, QUALITY, MODEL, 0.6) is None
    rows = search_report.held_out_rows(SEARCH, QUALITY, SHARES)
    assert [r[5].value for r in rows] == pytest.approx([0.08 / np.sqrt(0.04 * 0.16), 0.5])
    ablation = search_report.ablation_rows(SEARCH, SHARES)
    assert ablation[1][3].value == pytest.approx(2) and ablation[1][4] is None and {len(r) for r in ablation} == {6}
    found = search_report.search_rows(SEARCH, SHARES)
    assert found[0][0] == search_report.named(BEST) and found[1][2] is None


def test_the_choice_stands_beside_methods_and_shows_where_its_budget_went():
    found = search_report.against(SEARCH, QUALITY, ("teal_head",))[MODEL]
    assert list(found) == ["teal_head", "spread"] and [x for x, _ in found["spread"]] == list(SHARES)
    assert search_report.allocated(SEARCH, 0.2) == {}, "one density for all"
    densities = {"up_in": [0.5, 0.7], "head_in": [1.0, 0.1]}
    points = [{**point(0.2, 0.1), "recipe": {"allocation": densities}}, {"share": 0.3, "reason": "no"}]
    spread = {"models": {MODEL: {"held out": {"chosen": {"points": points}}}}}
    assert search_report.allocated(spread, 0.2) == {MODEL: densities} and search_report.allocated(spread, 0.3) == {}
    assert figures.allocation(search_report.allocated(spread, 0.2)) is not None


def speed_row(method, share, ratio, token_share=1.0):
    ratios = [[ratio * (1 + 0.001 * (i % 3 - 1)) for i in range(9)] for build in range(3)]
    return {"method": method, "share": share, "skipped": share, "ratio": ratio, "ratios": ratios, "dense": 0.01,
            "sparse": 0.01 / ratio, "bytes": {"dense": 10, "sparse": 6}, "bandwidth": 1.0, "token_share": token_share}


SPEED = {MODEL: [speed_row("spread", 0.3, 1.5), speed_row("teal_head", 0.3, 1.4),
                 {"method": "wanda", "share": 0.3, "reason": "no"}, speed_row("griffin", 0.2, 1.1, token_share=0.5)]}


def test_what_is_lost_is_compared_in_equal_time_too():
    # as fast: the search's own share counts. Slower: it skips more until it is; faster: no less than was asked for
    even = speed_report.at_equal_time(SEARCH, QUALITY, SPEED, MODEL, 0.3)
    ratio = search_report.over_best(SEARCH, QUALITY, MODEL, 0.3)[1].value
    assert even[0] == "teal_head" and even[1] == 0.3 and even[2].value == pytest.approx(ratio)
    slow = {MODEL: [speed_row("spread", 0.2, 1.1), speed_row("spread", 0.6, 1.8), speed_row("teal_head", 0.3, 1.4)]}
    rising = {"models": {MODEL: {"held out": {"chosen": {"points": [point(0.3, 0.05), point(0.5, 0.2)]}}}}}
    best, share, later = speed_report.at_equal_time(rising, QUALITY, slow, MODEL, 0.3)
    low, high = 1 / 1.1, 1 / 1.8
    assert best == "teal_head" and share == pytest.approx(0.2 + 0.4 * (low - 1 / 1.4) / (low - high))
    assert later.value == pytest.approx(0.05 * 4 ** ((share - 0.3) / 0.2) / 0.16, rel=1e-3)
    assert later.low <= later.value <= later.high
    assert speed_report.verdict_equal_time(SEARCH, QUALITY, SPEED, MODEL, 0.3).outcome == "reproduced"
    assert speed_report.verdict_equal_time(SEARCH, QUALITY, SPEED, MODEL, 0.7) is None
    rows = speed_report.equal_time_rows(rising, QUALITY, slow, (0.3, 0.7))
    assert [len(row) for row in rows] == [6] and rows[0][1:3] == ["30%", search_report.label("teal_head")]
    assert speed_report.by_round(SPEED, MODEL, 0.3, "teal_head").to_json() == pytest.approx([1.5 / 1.4] * 3)
    # never in reach: the line goes on as it fell last, and ends with what was measured in quality
    never = {MODEL: [speed_row("spread", 0.2, 1.01), speed_row("spread", 0.3, 1.02), speed_row("teal_head", 0.3, 3.0)]}
    assert speed_report.at_equal_time(SEARCH, QUALITY, never, MODEL, 0.3) is None


def test_speed_is_compared_in_times_dense():
    assert speed_report.verdict_speed(SEARCH, QUALITY, SPEED, MODEL, 0.3).outcome == "reproduced"
    slower = {MODEL: [speed_row("spread", 0.3, 1.2), SPEED[MODEL][1]]}
    assert speed_report.verdict_speed(SEARCH, QUALITY, slower, MODEL, 0.3).outcome == "not reproduced"
    assert speed_report.verdict_speed(SEARCH, QUALITY, SPEED, MODEL, 0.6) is None
    # read at the share that is compared: a method that skips more is as fast as it would be with less
    more = {MODEL: [speed_row("spread", 0.3, 1.5), {**speed_row("teal_head", 0.3, 2.0), "skipped": 0.45}]}
    number = speed_report.verdict_speed(SEARCH, QUALITY, more, MODEL, 0.3).number
    assert number == pytest.approx(1.5 - 1 / (1 - 0.5 * 0.3 / 0.45)) and speed_report.time_at(more[MODEL][:1], 0.4) is None
    rows = speed_report.speed_rows(SPEED)
    assert rows[0][4].value == pytest.approx(1.5) and len(rows) == 3 and {len(r) for r in rows} == {6}
    assert speed_report.not_run_rows(SPEED) == [["Wanda weights", "no"]]
    found = speed_report.picture(SPEED, QUALITY, SEARCH)[MODEL]
    assert set(found) == {"spread", "teal_head", "griffin"} and found["spread"][0][1].value == pytest.approx(0.08 * MEAN)
    # a fifth of the weights of every sparse token: a tenth over all tokens, half of which have no KL
    assert found["griffin"][0][1].value == pytest.approx(2 * 0.1 * FACTORS["griffin"] * MEAN)
    assert figures.picture({MODEL: found}) is not None


def test_protocol_rows_are_over_the_first_setting():
    def rows(name, values):
        return [{"change": {"calibration": {"source": v} if v else {}}, "quality": quality(k), "shares": {"skipped": 0.2}}
                for v, k in values]

    data = {MODEL: {"teal": {"text": rows("source", [("", 0.1), ("squad", 0.2)])}}}
    found = protocol_report.protocol_rows(data, "text")
    assert [r[1] for r in found] == ["TEAL, all sources", "TEAL, squad"] and found[1][4].value == pytest.approx(2)
    assert protocol_report.protocol_ratio(data, MODEL, "teal", "text", "squad").value == pytest.approx(2)
    more = {MODEL: {**data[MODEL], "cats": {"text": rows("source", [("", 0.1), ("squad", 0.12), ("drop", 0.02)])}, "wina": {}}}
    assert protocol_report.largest_change(more, "text")[:3] == (MODEL, "cats", "drop")
    assert protocol_report.change_name({"token_share": 0.1}) == "10% of tokens"
    assert protocol_report.change_name({"calibration": {"tokens": 512, "length": 64}}) == "512 tokens, 64 a sequence"
    assert figures.effects(protocol_report.protocol_points(data, "text")) is not None
    assert not protocol_report.protocol_rows(data, "seed")


def task(name, right):
    values = {metric: tuple(map(float, right)) for metric in ("acc", "acc_norm")}
    means = dict.fromkeys(values, float(np.mean(right)))
    return TaskResult(name, "test", 0, len(right), means, dict.fromkeys(values, 0.1), tuple(range(len(right))), values)


def test_nine_tasks_count_alike():
    def run(right):
        found = {}
        for group in ("scap7", "openbookqa", "mmlu"):
            tasks = {name: task(name, right) for name in resolve(group)}
            found[group] = BenchmarkResult(tasks, None, 0, "prefix", 1.0, "0").to_dict()
        return found

    data = {MODEL: [{"method": "dense", "share": 0.0, "results": run([1, 1, 1, 0])},
                    {"method": "cats", "share": 0.2, "results": run([1, 1, 0, 0]), "skipped": 0.2},
                    {"method": "cats", "share": 0.9, "reason": "no"}]}
    rows = report.task_rows(data)
    assert rows[0][2].value == 75 and rows[1][2].value == 50 and rows[1][3].value == pytest.approx(-25) and rows[2][3] is None
    assert [r[1] for r in rows] == ["dense", "CATS, 20%", "CATS, 90%"]
    assert len({*resolve("book9")}) == 7 + 1 + 57


def test_many_documents_set_the_choice_beside_each():
    def run(right):
        return {"scap7": BenchmarkResult({n: task(n, right) for n in resolve("scap7")}, None, 0, "prefix", 1.0, "0").to_dict()}

    data = {MODEL: [{"method": "dense", "share": 0.0, "results": run([1, 1, 1, 0])},
                    {"method": "cats", "share": 0.4, "reason": "no"},
                    {"method": "teal", "share": 0.4, "results": run([1, 0, 0, 0])},
                    {"method": "spread", "share": 0.4, "results": run([1, 1, 0, 0])},
                    {"method": "spread", "part": "without x", "share": 0.4, "results": run([0, 0, 0, 0])}]}
    rows = search_report.many_rows(data)
    assert [r[1] for r in rows] == ["dense", "TEAL, 40%", "this book's search, 40%", "this book's search, without x, 40%"]
    assert [c and round(c.value) for c in (r[3] for r in rows)] == [None, -50, -25, -75]
    assert [c and round(c.value) for c in (r[4] for r in rows)] == [None, 25, None, 50]


def test_perplexity_and_agreement_are_read_off_between_points():
    found = report.other_at(QUALITY[MODEL]["methods"]["larosa"], "perplexity", 0.2)  # loss is linear between 0.1 and 0.3
    assert found.value == pytest.approx(np.exp(3 + (0.05 + 0.2) / 2 * MEAN)) and found.low < found.value < found.high
    assert report.other_at(QUALITY[MODEL]["methods"]["larosa"], "agreement", 0.2).value == pytest.approx(50)
    assert report.other_at(QUALITY[MODEL]["methods"]["larosa"], "agreement", 0.5) is None
    rows = report.other_rows(QUALITY, "perplexity", (0.1, 0.5), ("larosa",))
    assert [r[1] for r in rows] == ["dense", "LaRoSA"] and rows[0][2].value == pytest.approx(np.exp(3)) and rows[1][3] is None
    far = {MODEL: {**QUALITY[MODEL], "methods": {"larosa": [point(0.1, 5.0)]}}}
    assert report.other_rows(far, "perplexity", (0.1,))[1][2].fmt == ".2g"
    found = report.other_rows(report.with_search(QUALITY, SEARCH), "perplexity", (0.2,), ("larosa", "spread"))
    assert found[2][1] == "this book's search" and found[2][2].value == pytest.approx(np.exp(3 + 0.08 * MEAN))


def test_a_sparse_tokens_divergence_is_what_all_have_by_their_share():
    rows = [{"change": {"token_share": part}, "quality": quality(0.1 * part), "shares": {"skipped": 0.2}} for part in (1.0, 0.5)]
    found = protocol_report.protocol_rows({MODEL: {"teal": {"tokens": rows}}}, "tokens")
    assert found[0][4].value == pytest.approx(found[1][4].value) == found[0][3].value and found[1][5].value == pytest.approx(0.5)


def test_figures_are_drawn():
    assert figures.curves(report.quality_points(QUALITY, ["cats", "larosa"])) is not None
    assert figures.allocation({MODEL: {"down_in": [0.5, 0.4], "head_in": [1.0, 0.2]}}) is not None
