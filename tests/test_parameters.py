"""The parameters cell: its grammar, and what a user's text may become."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_lib.errors import SparsityError
from sparsity_lib.parameters import parse_cell, read_assignments, split_assignments

CELL = """\
model: str = "smollm2"  # any model
density: float = 0.5  # (0, 1] share of neurons kept
method: str = "claws"  # one of: claws, cats; what to compare
sweep: list[float] = [0.7, 0.5]  # (0, 1] densities
sequences: int | None = 8  # [1, 512] None for all
quick: bool = True
names: list[str] = [
    "a",
    "b",
]  # one of: a, b, c
"""


@pytest.fixture(scope="module")
def known():
    return parse_cell(CELL)


def test_grammar_is_read_in_full(known):
    assert list(known) == ["model", "density", "method", "sweep", "sequences", "quick", "names"]
    assert known["density"].interval == ("(", 0.0, 1.0, "]")
    assert known["density"].help == "share of neurons kept"
    assert known["method"].choices == ("claws", "cats") and known["method"].help == "what to compare"
    assert known["sequences"].optional and known["sequences"].kind == "int"
    assert known["names"].listed and known["names"].choices == ("a", "b", "c")
    assert known["quick"].help == ""


@pytest.mark.parametrize(("pair", "value"), [
    ("density=1", 1.0), ("density=1e-3", 0.001), ("method=cats", "cats"), ("sequences=none", None),
    ("sequences=512", 512), ("quick=False", False), ("sweep=[0.3, 1]", [0.3, 1.0]), ('names=["c"]', ["c"]),
    ("model=/some/folder with=space", "/some/folder with=space"), ("model='quoted'", "quoted"),
])
def test_good_values(known, pair, value):
    (result,) = read_assignments([pair], known).values()
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(("pair", "said"), [
    ("densty=0.3", "'density'"), ("density=0", "(0, 1]"), ("density=1.5", "(0, 1]"), ("density=nan", "(0, 1]"),
    ("density=inf", "(0, 1]"), ("density=", "(0, 1]"), ("density=half", "a number in"), ("density=True", "number"),
    ("method=clows", "'claws'"), ("sequences=0", "[1, 512]"), ("sequences=8.0", "whole number"),
    ("sequences=513", "[1, 512]"), ("quick=1", "true or false"), ("sweep=0.5", "JSON list"), ("sweep=[]", "JSON list"),
    ("sweep=[0.5, 2]", "(0, 1]"), ("sweep=[NaN]", "JSON list"), ("sweep=[true]", "number"), ('names=["d"]', "one of"),
    ("model=", "a text"), ("density", "name=value"), ("sequences=" + "9" * 5000, "[1, 512]"),
    ("sweep=" + "[" * 5000, "JSON list"),
    ("sweep=[1" + "0" * 400 + "]", "(0, 1]"), ("densities" + "9" * 5000, "name=value"),
], ids=lambda text: text[:30])
def test_bad_values_are_refused_with_what_is_allowed(known, pair, said):
    with pytest.raises(SparsityError) as caught:
        read_assignments([pair], known)
    assert said in str(caught.value) and len(str(caught.value)) < 600


def test_a_parameter_given_twice_is_refused(known):
    with pytest.raises(SparsityError, match="twice"):
        read_assignments(["density=0.3", "density=0.4"], known)


@pytest.mark.parametrize("cell", [
    "density = 0.5", "density: float", "x: dict = {}", "x: float = 2.0  # (0, 1]", "x: str = 'a'  # (0, 1]",
    "x: str = 'a'  # one of", "x: int = print()", "x: float = 0.5  # (0, 1", "x: int = 1\nx: int = 2", "import os",
    "x: float = (", "x: list[float = 1",
])
def test_cells_outside_the_grammar_are_refused(cell):
    with pytest.raises(SparsityError):
        parse_cell(cell, "here")


def test_one_line_holds_several_assignments_with_spaces():
    text = '  density=0.3 sweep=[0.5, 0.3]  names=["a", "b"] model=my model '
    assert split_assignments(text) == ["density=0.3", "sweep=[0.5, 0.3]", 'names=["a", "b"]', "model=my model"]
    assert split_assignments("  ") == []
    with pytest.raises(SparsityError, match="name=value"):
        split_assignments("stray density=0.3")


@given(st.text(max_size=40))
def test_no_text_gets_past_the_range(text):
    known = parse_cell(CELL)
    try:
        value = read_assignments([f"density={text}"], known)["density"]
    except SparsityError:
        return
    assert type(value) is float and math.isfinite(value) and 0 < value <= 1
