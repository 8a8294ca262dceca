"""Claims: what became of each follows from stored results, and from nothing else."""

import json
import re

import pytest
from book_checkout import put
from test_benchmarks_result import coin, result_of
from test_cwic_report import ablations, small, teal  # noqa: F401  fixtures

from sparsity_lib import claims, project, results
from sparsity_lib.book import markdown
from sparsity_lib.claims import base, page
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.groups import resolve
from sparsity_lib.verdicts import DIRECTION, NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Verdict, effect

#: The papers' claims by number: all of them have to be on the page.
WANTED = [*(f"K{i}" for i in range(1, 7)), *(f"A{i}" for i in range(1, 18)), *(f"F{i}" for i in range(1, 6)),
          *(f"S{i}" for i in range(1, 11)), *(f"N{i}" for i in range(1, 7)), "T1"]


def verdict(claim="X1", outcome=REPRODUCED, number=1.0):
    return Verdict(claim, "words", "experiment", number, number, number, outcome, "because")


def every():
    return [claim for each in claims.PAPERS.values() for claim in each]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty book in which results can be put."""
    (tmp_path / "notebooks" / "records").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    return tmp_path


def test_every_claim_is_there_once_in_the_order_of_its_paper():
    assert [claim.id for claim in every()] == WANTED
    assert all(claim.tests and claim.words and claim.chapter for claim in every())


@pytest.mark.parametrize(("outcomes", "expected"), [
    ([], base.PENDING), ([NOT_TESTABLE], NOT_TESTABLE), ([REPRODUCED, NOT_TESTABLE], REPRODUCED),
    ([REPRODUCED, REPRODUCED], REPRODUCED), ([REPRODUCED, DIRECTION], DIRECTION), ([NOT_REPRODUCED], NOT_REPRODUCED),
    ([NOT_REPRODUCED, REPRODUCED], base.MIXED), ([NOT_REPRODUCED, DIRECTION, REPRODUCED], base.MIXED),
])
def test_one_word_for_many_verdicts(outcomes, expected):
    assert base.together(outcomes) == expected


def test_figures_and_tables_that_claims_name_are_in_the_chapters_that_are_there():
    there = {f"notebooks/{name}" for name in markdown.chapters()}
    for claim in every():
        if f"notebooks/{claim.chapter}" in there and claim.labels:
            found = [label for label in claim.labels if label in markdown.labels()]
            assert found, f"{claim.id}: none of {claim.labels} is in {claim.chapter}"


def test_a_claim_without_results_says_which_command_makes_them(checkout):
    for claim in every():
        found = base.judge(claim)
        assert not [v for v in found.verdicts if v.number is not None], claim.id
        for what, why in found.missing:
            assert what and re.match(r"`make (results R=|refresh NB=)", why), (claim.id, why)
    assert base.judge(next(c for c in every() if c.id == "A1")).outcome == base.PENDING
    with pytest.raises(SparsityError, match="pending: `make results R=cwic_small`"):
        next(c for c in every() if c.id == "A4").tests[0].verdicts()


def test_a_test_tells_what_is_missing(checkout):
    assert base.Test("x", list, ("cwic_small", "cwic_smol")).missing() == '`make results R="cwic_small cwic_smol"`'
    assert base.Test("x", list, ("bench/gpu",)).missing() == "`make results R=bench/gpu` on a machine with a GPU"
    assert "no experiment called nothing" in base.Test("x", list, ("nothing",)).missing()
    assert base.Test("x", list, record="claws").missing() == "`make refresh NB=claws`"
    assert base.Test("x", lambda stored: [verdict()]).verdicts() == [verdict()]
    put("cwic_small", {"runs": {}})
    test = base.Test("x", lambda stored: [stored["cwic_small"].data["teal"]], ("cwic_small",))
    assert test.missing() == ""
    with pytest.raises(SparsityError, match="results/cwic_small.json lacks 'teal'"):
        test.verdicts()


def test_verdicts_of_one_claim_are_told_from_others():
    found = [verdict(name) for name in ("A1", "A1, Gemma", "A13, x", "B1")]
    assert [v.claim for v in base.of_claim(found, "A1")] == ["A1", "A1, Gemma"]
    assert base.renamed(found[1], "F5").claim == "F5, Gemma" and base.renamed(found[0], "F5").claim == "F5"


def test_verdicts_are_read_from_a_chapters_record(checkout):
    entries = {}
    for name, outcome, value in (("K1, gate", DIRECTION, 2.0), ("K10, other", REPRODUCED, 3.0), ("K1, none", NOT_TESTABLE, None)):
        entries[f"tab: {name}, verdict"] = {"value": outcome}
        if value is not None:
            for end, by in (("", 0), (" low", -1), (" high", 1)):
                entries[f"tab: {name}, our number [95% interval]{end}"] = {"value": value + by}
    (checkout / "notebooks" / "records" / "demo.json").write_text(json.dumps({"entries": entries}))
    (found,) = base.recorded("demo", "tab", "K1", "words", "experiment")({})
    assert (found.claim, found.outcome, found.number, found.low, found.high) == ("K1, gate", DIRECTION, 2.0, 1.0, 3.0)
    with pytest.raises(SparsityError, match="no verdict on K2 in tab. Fix: make refresh NB=demo"):
        base.recorded("demo", "tab", "K2", "words", "experiment")({})


def test_cwic_fills_in_as_its_results_arrive(checkout, small, ablations):  # noqa: F811
    by_id = {claim.id: claim for claim in every()}
    put("cwic_small", small)
    assert base.judge(by_id["A4"]).outcome == REPRODUCED and base.judge(by_id["A5"]).outcome == base.PENDING
    assert {v.claim for v in base.judge(by_id["A1"]).verdicts} == {
        "A1, small-llama, CWIC, active parameters", "A1, small-llama, thresholds alone, to 3x"}
    put("cwic_ablations", ablations)
    put("cwic_limit", {seed: small["runs"][f"active {seed}"] for seed in "012"})
    points = [{"kept": 1 / 3, "way": "stripes", "times_as_fast": [2.6] * 15}]
    put("bench/cwic", {"product": {"stripes_over_columns": {"0.333": [1.0, 1.02, 0.99] * 5}, "points": points},
                                 "decoding": {"3x imposed": {"ratio": 3.0, "times_as_fast": [1.4, 1.5, 1.6] * 5}}})
    outcomes = {"dense": 0.6, "smollm2-cwic-3x": 0.5, "teal 3x": 0.3}
    scores = {name: result_of({task: coin(400, p, 7) for task in resolve("cwic6")}).to_dict() for name, p in outcomes.items()}
    put("cwic_tasks", {name: {"ratio": 3.0, "result": found} for name, found in scores.items()}, group="cwic6")
    put("cwic_smol", {"runs": {}, "teal": {"uniform": teal(0.3), "greedy": teal(0.25)}})
    found = {id: base.judge(by_id[id]) for id in WANTED if id[0] in "AF"}
    masks = {"A7", "A8", "A9", "A11", "A12", "F5"}  # from watched masks, which are not there
    assert {id for id, judged in found.items() if judged.outcome == base.PENDING} == masks
    assert [v.claim for v in found["A10"].verdicts] == ["A10, head limit"]
    assert any(v.claim == "A1, SmolLM2, tasks" for v in found["A1"].verdicts)
    assert {v.claim for v in found["F3"].verdicts} == {"F3, warm-up", "F3, head limit"}
    assert all(v.claim.split(",")[0] == id for id, judged in found.items() for v in judged.verdicts)


def test_products_on_a_gpu_are_judged_from_the_slowest_to_the_fastest_shape(checkout):
    points = {name: {"points": {"sparse 0.66": {"speedup": speed}}} for name, speed in (
        ("bfloat16 14336 x 4096, 1 tokens", 2.0), ("bfloat16 4096 x 14336, 1 tokens", 2.6),
        ("bfloat16 4096 x 14336, 16 tokens", 0.1), ("int8 4096 x 14336, 1 tokens", 9.0))}
    put("bench/gpu", points)
    (test,) = (t for c in every() if c.id == "A2" for t in c.tests if t.needs == ("bench/gpu",))
    (found,) = test.verdicts()
    assert (found.low, found.high, found.outcome) == (2.0, 2.6, REPRODUCED) and found.number == pytest.approx((2.0 * 2.6) ** 0.5)


def test_the_page_shows_number_interval_verdict_reason_and_source():
    claim = claims.Claim("X1", "loses “nothing”", "nowhere", ("fig-none",), (base.Test("ours", list, ("claws_sweep",)),))
    made = effect("X1, gemma3-270m", "w", "our test; sizes were set", number=1.2345, low=1.1, high=1.3, published=2.0, null=1.0)
    other = Verdict("X1, tasks", "w", "`make it`", None, None, None, NOT_TESTABLE, "takes a larger one")
    text = page._block(base.Judged(claim, (made, other), (("a run", "`make results R=a`"),)))
    assert text.startswith("{#claim-x1 .claim}\n### X1 <span ") and "*The paper:* Loses “nothing”." in text
    assert '- Gemma: <span class="num">1.23 [1.10, 1.30]</span> ' in text and "↗ direction only</span>, the interval lies" in text
    assert "*Here:* Our test; sizes were set." in text
    assert "lies beyond 1 on the claimed side, but does not reach the size asked for, 2" in text
    assert "Tasks: " in text and "takes a larger one. The command for that: `make it`." in text
    assert "… pending</span>: `make results R=a`." in text and "numref" not in text


def test_names_of_the_code_become_words():
    assert page._readable("lambada_openai at down_in, 3 +- 1") == "LAMBADA at down's inputs, 3 ± 1"
    assert page._readable("results/nm_triviaqa.json, triviaqa-x") == "results/nm_triviaqa.json, triviaqa-x"
    same = "the interval lies beyond 0 on the claimed side and reaches the size asked for, 1"
    assert page._readable(same) == same


def test_every_stored_verdict_is_of_the_claim_it_stands_under_and_grouped_by_experiment():
    for found in (judged for each in page.judged().values() for judged in each):
        assert all(v.claim.partition(",")[0] == found.claim.id for v in found.verdicts), found.claim.id
        text = page._block(found)
        headings = [line for line in text.splitlines() if line.startswith("*Here:*")]
        assert len(headings) == len(set(headings)), found.claim.id
        for name in page.IDENTIFIERS:
            assert not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), (found.claim.id, name)


def test_counts_add_up_and_an_unknown_paper_is_refused():
    rows = [line.split("|")[1:-1] for line in page.counts().splitlines() if line.startswith("|")][2:]
    numbers = [[int(cell) for cell in row[1:]] for row in rows]
    assert all(sum(row[:-1]) == row[-1] for row in numbers) and numbers[-1] == [sum(c) for c in zip(*numbers[:-1], strict=True)]
    assert numbers[-1][-1] == len(WANTED) and f"{len(WANTED)} claims" in page.summary()
    with pytest.raises(SparsityError, match="did you mean 'SCAP'"):
        page.blocks("SCPA")


def test_slips_are_pasted_as_tables():
    assert "divide by the pruned score" in page.slips_scap() and "-37.72%" in page.slips_scap()
    assert "245 million" in page.slips_cwic() and page.slips_cwic().count("\n| ") >= 9


def test_results_of_claims_are_known_experiments():
    from sparsity_lib.experiments import EXPERIMENTS

    assert {name for claim in every() for test in claim.tests for name in test.needs} <= set(EXPERIMENTS) | set(results.names())
