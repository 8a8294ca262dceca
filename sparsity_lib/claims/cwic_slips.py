"""What CWIC's printed numbers say when they are computed again: rows, averages, columns and words of its two versions."""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

#: Printed numbers have one digit after the point, so means of seven of them are sure to about this.
ROUNDING = 0.1
DENSE_WEIGHTS = 1236


class Row(NamedTuple):
    """A printed row: reduction of active weights (1 for dense), printed mean, scores of MMLU, WG, Arc-C, HS, Arc-E, OBQA, PIQA."""

    model: str
    technique: str
    factor: float
    average: float
    scores: tuple[float, ...]


#: Active-parameter version, table 3.
TABLE3 = (
    Row("Gemma-3-270M", "dense", 1.0, 43.6, (24.3, 52.7, 27.6, 43.8, 57.5, 30.6, 68.9)),
    Row("Llama-3.2-1B", "dense", 1.0, 53.1, (38.6, 57.9, 36.9, 64.2, 61.7, 37.2, 74.9)),
    Row("Llama-3.2-1B", "CWIC", 2.05, 49.2, (27.7, 56.0, 33.5, 58.4, 60.2, 35.8, 72.9)),
    Row("Llama-3.2-1B", "CWIC", 3.05, 47.5, (26.7, 55.7, 33.1, 53.6, 58.0, 34.8, 70.4)),
    Row("Llama-3.2-1B", "CWIC", 4.05, 46.1, (26.4, 53.3, 30.2, 50.3, 56.9, 36.2, 69.2)),
    Row("Llama-3.2-1B", "CWIC", 5.05, 44.2, (25.2, 51.6, 29.2, 48.3, 52.8, 33.4, 68.8)),
    Row("Llama-3.2-1B", "CWIC", 6.05, 43.8, (24.9, 52.2, 30.6, 46.6, 53.4, 30.8, 68.1)),
    Row("Llama-3.2-1B", "CWIC, longer", 6.05, 44.5, (26.0, 53.4, 31.0, 48.0, 53.9, 31.4, 68.0)),
    Row("Llama-3.2-3B", "dense", 1.0, 61.7, (55.2, 65.1, 46.3, 74.1, 72.1, 40.8, 78.1)),
    Row("Llama-3.2-3B", "CWIC", 2.05, 57.2, (47.4, 60.1, 42.2, 68.3, 69.1, 38.0, 75.6)),
    Row("Llama-3.2-3B", "CWIC", 3.05, 54.7, (38.3, 58.3, 39.5, 64.3, 69.4, 39.4, 73.9)),
    Row("Llama-3.2-3B", "CWIC", 4.05, 52.5, (32.3, 57.0, 38.6, 61.5, 67.1, 37.0, 74.3)),
    Row("Llama-3.2-3B", "CWIC", 5.05, 49.8, (28.8, 53.6, 35.2, 59.1, 62.6, 37.4, 71.7)),
    Row("Llama-3.2-3B", "CWIC", 6.05, 49.4, (27.6, 53.8, 34.3, 57.7, 62.2, 38.2, 72.0)),
    Row("Llama-3.2-1B", "TEAL", 1.65, 48.1, (28.1, 55.3, 34.0, 55.2, 56.6, 35.6, 71.7)),
    Row("Llama-3.2-1B", "TEAL", 2.11, 39.1, (24.1, 51.3, 24.7, 39.0, 43.0, 30.0, 61.9)),
    Row("Llama-3.2-1B", "TEAL", 2.44, 34.0, (22.9, 48.0, 22.7, 28.9, 32.8, 28.0, 55.0)),
    Row("Llama-3.2-1B", "TEAL", 2.70, 33.2, (22.9, 48.5, 24.9, 26.3, 29.0, 28.4, 52.0)),
    Row("Llama-3.2-1B", "TEAL", 2.91, 32.8, (23.0, 49.4, 25.1, 26.0, 26.6, 29.8, 50.1)),
)
#: Table 1: what it prints for the 1B model at 3.05x, and its active weights in millions.
TABLE1 = Row("Llama-3.2-1B", "CWIC", 3.05, 44.2, (25.2, 51.6, 29.2, 48.3, 52.8, 33.4, 68.8))
TABLE1_ACTIVE = 245
NO_STRIPES, NO_MSE = 45.8, 45.9  # table 2, at 3.05x
CLAIMED_GAIN = 15  # "a 15% increase in aggregate benchmark scores" over TEAL at 66%
#: FLOP version, table 1: reduction -> printed average, then MMLU, ARC-C, ARC-E, HellaSwag, WinoGrande, BoolQ, SciQ.
FLOPS1 = {
    1: (57.1, (48.3, 54.8, 72.4, 41.1, 52.5, 53.3, 77.6)), 2: (54.5, (43.6, 47.5, 66.8, 38.8, 51.9, 60.1, 72.6)),
    3: (51.5, (40.3, 44.1, 59.9, 34.1, 49.5, 60.1, 72.3)), 4: (48.4, (37.9, 38.6, 57.5, 33.4, 50.3, 55.3, 65.5)),
    5: (46.4, (35.7, 37.3, 55.6, 30.7, 50.3, 54.8, 60.7)), 6: (44.0, (33.8, 32.1, 49.8, 29.4, 53.0, 53.6, 56.4)),
}
#: FLOP version, table 3, MMLU, baseline column by reduction; and without stripes.
FLOPS3_MMLU = {2: 48.3, 3: 43.6, 4: 40.3, 5: 35.7, 6: 33.8}
FLOPS3_NO_STRIPES = {2: 30.1, 3: 24.9, 4: 24.7, 5: 25.6, 6: 22.5}
#: What the FLOP version's text compares with SmolLM, by reduction -> millions of weights, and what its table 2 does.
TEXT_PAIRS, TABLE2_PAIRS = {2: 360, 6: 360}, {3: 360, 6: 135}


def find(model: str, technique: str, factor: float) -> Row:
    """The row of table 3 with this reduction."""
    return next(row for row in TABLE3 if row[:3] == (model, technique, factor))


def same_scores(row: Row) -> Row | None:
    """The row of table 3 that has the very scores of `row`."""
    return next((other for other in TABLE3 if other.scores == row.scores), None)


def wrong_averages() -> list[tuple[str, float, float]]:
    """What, printed average and mean of its scores, of rows in both versions where they differ by more than rounding allows."""
    every = [(f"{r.model}, {r.technique} {r.factor:g}x", r.average, mean(r.scores)) for r in TABLE3]
    every += [(f"FLOP version, {factor}x", average, mean(scores)) for factor, (average, scores) in FLOPS1.items()]
    return [row for row in every if abs(row[1] - row[2]) > ROUNDING]


def shifted(column: dict[int, float]) -> dict[int, int]:
    """Reduction in table 3 of the FLOP version -> reduction in its table 1 that has this MMLU score."""
    return {factor: next(other for other, (_, scores) in FLOPS1.items() if scores[0] == value) for factor, value in column.items()}


def kernel(z: float) -> float:
    """The pseudo-derivative as both versions print it, K(z) = H(z - 1/2) - H(z + 1/2)."""
    return float(z >= 0.5) - float(z >= -0.5)


def rows() -> list[list[str]]:
    """Where, what is printed, what it is when computed again."""
    twin = same_scores(TABLE1)
    full, teal = find("Llama-3.2-1B", "CWIC", 3.05), find("Llama-3.2-1B", "TEAL", 2.91)
    moved = shifted(FLOPS3_MMLU)
    averages = wrong_averages()
    return [
        ["active, table 1", f"1B at {TABLE1.factor:g}x: {TABLE1.average} with {TABLE1_ACTIVE}M active weights",
         f"the scores of table 3's {twin.factor:g}x row, and {DENSE_WEIGHTS}M / {TABLE1_ACTIVE}M = {DENSE_WEIGHTS / TABLE1_ACTIVE:.2f}; "
         f"the 3.05x row has {full.average} with {DENSE_WEIGHTS / 3.05:.0f}M"],
        ["active, abstract", f"\"a {CLAIMED_GAIN}% increase\" over TEAL at 66%",
         f"{full.average} against {teal.average}: {full.average - teal.average:.1f} points, which are "
         f"{100 * (full.average / teal.average - 1):.0f}% (TEAL's nearest row, {teal.factor:g}x)"],
        ["active, section 1", "TEAL collapses beyond \"33% sparsity (3x reduction in AP)\"",
         f"a reduction of 3x is a sparsity of {100 * (1 - 1 / 3):.0f}%; a third of the weights left out is {1 / (1 - 1 / 3):.1f}x"],
        ["active, tables 2 and 4", "the row \"No MSE\", in the text an ablation that adds a mean squared error",
         f"{full.average - NO_MSE:.1f} points either way; which of the two it was cannot be told"],
        ["FLOP, table 3", "MMLU baseline " + ", ".join(f"{v} at {f}x" for f, v in FLOPS3_MMLU.items()),
         "by table 1 these are the scores at " + ", ".join(f"{other}x" for other in moved.values())],
        ["FLOP, section 4.3", "2x and 6x beside SmolLM-360M and again SmolLM-360M",
         "table 2 compares " + " and ".join(f"{f}x with {size}M" for f, size in TABLE2_PAIRS.items())],
        ["both, stripes", f"without stripes {full.average - NO_STRIPES:.1f} points lower (active version, mean of seven at 3.05x)",
         f"FLOP version, MMLU at 3x: {FLOPS1[3][1][0]} falls to {FLOPS3_NO_STRIPES[3]}, where guessing gives 25"],
        ["both, equation of K", "K(z) = H(z - 1/2) - H(z + 1/2), called a rectangle",
         f"{kernel(0.0):g} at 0: the rectangle is its negation"],
        ["both, averages", f"{len(TABLE3) + len(FLOPS1)} printed means of seven scores",
         "all within rounding" if not averages else "not the mean of their scores: " + "; ".join(
             f"{what} (printed {printed}, mean {own:.1f})" for what, printed, own in averages)],
    ]
