"""Glued numbers and tables, records and their tolerances, verdicts; and that nbval sees what it should."""

import math
import subprocess
import sys

import nbformat
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_lib import notebooks, project, records, report, verdicts
from sparsity_lib.errors import SparsityError


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """What was displayed, as (data, metadata) pairs."""
    monkeypatch.setenv(records.SWITCH, str(tmp_path))
    out = []
    monkeypatch.setattr(report, "_show", lambda data, metadata=None: out.append((data, metadata or {})))
    report.start("demo")
    yield out
    report._current = None


def entries(tmp_path):
    return records.read(tmp_path / "demo.json")


def test_a_number_is_glued_and_recorded(shown, tmp_path):
    report.glue_number("ppl", numpy.float32(17.125), ".1f", low=16.9, high=17.4, rtol=0.02)
    ((data, metadata),) = shown
    assert data == {"application/papermill.record/text/plain": "'17.1 [16.9, 17.4]'"}
    assert metadata["scrapbook"]["name"] == "ppl"
    assert entries(tmp_path)["ppl"] == {"value": 17.125, "rtol": 0.02, "atol": 0.0}
    assert entries(tmp_path)["ppl high"]["value"] == 17.4


def test_a_table_marks_measured_numbers_and_no_others(shown, tmp_path):
    report.glue_table("tab", ["method", "n", "ppl"], [["a | b", 3, 17.0], ["c", 4, None]], "Two *methods*.")
    live, pasted = (data for data, _ in shown)
    assert '| a \\| b | 3 | <span class="num">17.00</span> |' in live["text/markdown"]
    block = pasted["application/papermill.record/text/markdown"]
    assert block.startswith(":::{table} Two *methods*.\n:name: tab\n") and "| c | 4 | – |" in block
    assert list(entries(tmp_path)) == ["tab: a | b, ppl"]


@pytest.mark.parametrize("call", [
    lambda: report.glue_number("x", math.nan), lambda: report.glue_number("x", "1"),
    lambda: report.glue_number("x", True),
    lambda: report.glue_number("x", 1.0, ".1f ms"), lambda: report.glue_table("t", ["a"], [], "Caption"),
    lambda: report.glue_table("t", ["a"], [[1.0, 2.0]], "Caption"), lambda: report.glue_table("t", ["a"], [[1]], " "),
    lambda: report.glue_table("t", ["a"], [[math.inf]], "Caption"),
    lambda: (report.glue_number("x", 1.0), report.glue_number("x", 1.0)),
    lambda: report.glue_number("x", 1.0, rtol=1.0), lambda: report.glue_number("x", 1.0, atol=math.inf),
])
def test_bad_input_is_refused(shown, call):
    with pytest.raises((SparsityError, ValueError)):
        call()


def test_without_a_record_nothing_is_glued():
    with pytest.raises(SparsityError, match=r"report\.start"):
        report.glue_number("x", 1.0)


def test_records_differ_exactly_beyond_their_tolerance():
    def entry(value, rtol=0.01, atol=0.0):
        return {"value": value, "rtol": rtol, "atol": atol}

    committed = {"a": entry(100.0), "b": entry([1.0, 2.0]), "c": entry("word", 0.0), "t": {"between": [0, 9]}}
    assert records.differences(committed, {**committed, "a": entry(100.9)}) == []
    for fresh in (
        {**committed, "a": entry(101.1)}, {**committed, "a": entry(100.0, rtol=0.5)}, {**committed, "b": entry([1.0])},
        {**committed, "c": entry("other", 0.0)}, {**committed, "new": entry(1.0)}, {"a": entry(100.0)},
        {**committed, "t": {"between": [0, 99]}},
    ):
        assert records.differences(committed, fresh)


def test_bounds_are_checked_when_recorded(shown):
    made = records.Records("other")
    made.add("seconds", 3.0, between=(0, 10))
    with pytest.raises(SparsityError, match="record slow"):
        made.add("slow", 11.0, between=(0, 10))


finite = st.floats(-100, 100)


@given(finite, finite, finite, st.floats(0.1, 50))
def test_effect_verdicts_follow_their_rule_and_mirror(a, b, c, published):
    low, number, high = sorted((a, b, c))
    verdict = verdicts.effect("K", "", "", number=number, low=low, high=high, published=published)
    assert (verdict.outcome == verdicts.NOT_REPRODUCED) == (low <= 0)
    assert (verdict.outcome == verdicts.REPRODUCED) == (low > 0 and high >= published)
    mirrored = verdicts.effect("K", "", "", number=-number, low=-high, high=-low, published=-published)
    assert mirrored.outcome == verdict.outcome


@pytest.mark.parametrize(("low", "number", "high", "outcome"), [
    (-0.5, 0.0, 0.5, verdicts.REPRODUCED), (-1.5, -0.5, 0.5, verdicts.DIRECTION),
    (-3.0, -2.0, -0.5, verdicts.NOT_REPRODUCED), (-1.0, 0.0, 0.5, verdicts.DIRECTION),
])
def test_kept_verdicts(low, number, high, outcome):
    assert verdicts.kept("K", "", "", number=number, low=low, high=high, margin=1.0).outcome == outcome


def test_verdicts_refuse_nonsense():
    with pytest.raises(SparsityError):
        verdicts.effect("K", "", "", number=1.0, low=2.0, high=3.0, published=1.0)
    with pytest.raises(SparsityError):
        verdicts.effect("K", "", "", number=math.nan, low=0.0, high=3.0, published=1.0)
    with pytest.raises(SparsityError):
        verdicts.kept("K", "", "", number=1.0, low=0.0, high=3.0, margin=0.0)


def test_nbval_ignores_measured_numbers_and_sees_everything_else(tmp_path, monkeypatch):
    """A number changed in the committed outputs passes nbval (its record is compared), a word does not."""
    sanitize = project.root() / "tests" / "nbval_sanitize.cfg"
    (tmp_path / "notebooks").mkdir()
    for file in ("_toc.yml", "pyproject.toml"):
        (tmp_path / file).write_text("")
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    monkeypatch.setenv(records.SWITCH, str(tmp_path / "fresh"))
    source = "\n".join([
        "from sparsity_lib import report, style", "report.start('demo')",
        "report.glue_number('n', 0.25)", "report.glue_table('t', ['method', 'ppl'], [['CATS', 18.5]], 'A caption.')",
        "figure, axes = style.figure()", "report.glue_figure('f', figure)",
    ])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id="a")])
    path = tmp_path / "notebooks" / "demo.ipynb"
    nbformat.write(notebook, path)
    notebooks.refresh(["demo"])
    text = path.read_text()

    def passes(content: str) -> bool:
        path.write_text(content)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-kernel-name",
                   "python3", "--nbval-sanitize-with", str(sanitize), str(path)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0

    assert text.count("18.50") == 2 and "0.25" in text and "iVBORw0KGgo" in text
    assert passes(text.replace("18.50", "18.51").replace("'0.25'", "'0.26'").replace("iVBORw0KGgo", "iVBORw0KGgoA"))
    assert not passes(text.replace('"A caption.', '"Another.'))


def test_texts_of_a_table_are_no_html(shown):
    report.glue_table("tab-x", ["model", "n"], [["<script>alert(1)</script> & co", 1]], "Caption.")
    text = shown[-1][0]["application/papermill.record/text/markdown"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text and "<script" not in text


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "", "a b", "a.b"])
def test_names_of_records_stay_in_their_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv(records.SWITCH, str(tmp_path / "inner"))
    with pytest.raises(SparsityError, match="name of a record"):
        report.start(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[" * 100_000, '{"entries": [1]}', '{"entries": {"a": 3}}', '{"entries": null}', "{"])
def test_damaged_records_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SparsityError, match="is not a record"):
        records.read(tmp_path / "x.json")
