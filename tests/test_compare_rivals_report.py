"""Rows and verdicts of the search's rivals on made-up numbers whose answers are known."""

import pytest
from test_compare_report import BEST, MODEL, SEARCH, SHARES, point, quality

from sparsity_lib.experiments import compare_rivals_report as report
from sparsity_lib.sites import HEAD_IN


def rival(share, kl, kept=0.125):
    rules = [{"site": "up_in", "select": {"density": 0.5}}, {"site": HEAD_IN, "select": {"density": kept}}]
    return {**point(share, kl), "recipe": {"rules": rules}}


def judged(share, kl, refine):
    return {"share": share, "candidate": {**BEST, "refine": refine}, "quality": quality(kl), "shares": {"skipped": share}}


RIVALS = {MODEL: {
    "methods": {"dense_again": [rival(0.2, 0.1), {"share": 0.3, "reason": "no"}],
                "teal_again": [rival(0.2, 0.16), rival(0.3, 0.2, 0.25)], "teal_greedy_head": [rival(0.2, 0.32), rival(0.3, 0.4)]},
    "neither": [rival(0.2, 0.32)],
    "words": [judged(s, kl, refine) for refine, kl in ((0.02, 0.2), (0.01, 0.3)) for s in SHARES]}}


def test_the_best_rival_has_the_least_divergence():
    best, ratio = report.best_rival(SEARCH, RIVALS, MODEL, 0.2)
    assert best == "dense_again" and ratio.value == pytest.approx(0.8) and ratio.low == pytest.approx(ratio.high)
    assert report.best_rival(SEARCH, RIVALS, MODEL, 0.3)[0] == "teal_again"
    assert report.best_rival(SEARCH, RIVALS, MODEL, 0.9) is None is report.verdict_rivals(SEARCH, RIVALS, MODEL, 0.9)
    assert report.verdict_rivals(SEARCH, RIVALS, MODEL, 0.2).outcome == "direction only"
    verdict = report.verdict_rivals(SEARCH, RIVALS, MODEL, 0.3)
    assert verdict.outcome == "reproduced" and "TEAL, head read twice" in verdict.experiment


def test_rows_have_every_rival_and_nothing_where_it_does_not_reach():
    rows = report.rival_rows(SEARCH, RIVALS, SHARES)
    assert [r[1] for r in rows] == [
        "dense blocks, head read twice", "TEAL, head read twice", "TEAL, greedy allocation, head included"]
    assert {len(r) for r in rows} == {2 + 2 * len(SHARES)} and rows[0][4:6] == [None, None]
    assert rows[1][5].value == pytest.approx(0.4)
    kept = report.preview_rows(RIVALS, SHARES)
    assert len(kept) == 2 and kept[0][3] is None and kept[1][3].value == 25


def test_two_parts_stand_beside_neither():
    own = SEARCH["models"][MODEL]["held out"]
    parts = {"without refined words": {"points": [point(0.2, 0.16)]}, "without the shared budget": {"points": []}}
    rows = report.two_by_two_rows({"models": {MODEL: {"held out": {**own, **parts}}}}, RIVALS, (0.2,))
    assert [r[1] for r in rows] == ["both", "one budget only", "second reading only", "neither: its KL"]
    assert rows[0][2].value == pytest.approx(0.25) and rows[1][2].value == pytest.approx(0.5) and rows[2][2] is None
    assert rows[3][2].value == pytest.approx(0.32, rel=0.06)


def test_words_are_listed_from_few_to_many():
    rows = report.words_rows(RIVALS, SHARES)
    assert [r[0].value for r in rows] == [1, 2] and rows[0][1].value > rows[1][1].value
