"""What both CWIC papers print, as data, and the places where their numbers and words do not fit together."""

from __future__ import annotations

from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from sparsity_lib.report import Number

#: Printed scores have one digit after the point, so a mean of seven of them is sure to about this (points).
ROUNDING = 0.1


class Row(NamedTuple):
    """A printed row: times fewer active weights (1: dense), mean (%), scores of MMLU, WG, ARC-C, HS, ARC-E, OBQA, PIQA."""

    model: str
    technique: str
    ratio: float
    average: float
    scores: tuple[float, ...]


#: Active-parameter version, table 3.
TABLE_3 = (
    Row("Gemma-270M", "dense", 1.0, 43.6, (24.3, 52.7, 27.6, 43.8, 57.5, 30.6, 68.9)),
    Row("1B", "dense", 1.0, 53.1, (38.6, 57.9, 36.9, 64.2, 61.7, 37.2, 74.9)),
    Row("1B", "CWIC", 2.05, 49.2, (27.7, 56.0, 33.5, 58.4, 60.2, 35.8, 72.9)),
    Row("1B", "CWIC", 3.05, 47.5, (26.7, 55.7, 33.1, 53.6, 58.0, 34.8, 70.4)),
    Row("1B", "CWIC", 4.05, 46.1, (26.4, 53.3, 30.2, 50.3, 56.9, 36.2, 69.2)),
    Row("1B", "CWIC", 5.05, 44.2, (25.2, 51.6, 29.2, 48.3, 52.8, 33.4, 68.8)),
    Row("1B", "CWIC", 6.05, 43.8, (24.9, 52.2, 30.6, 46.6, 53.4, 30.8, 68.1)),
    Row("1B", "CWIC, longer", 6.05, 44.5, (26.0, 53.4, 31.0, 48.0, 53.9, 31.4, 68.0)),
    Row("3B", "dense", 1.0, 61.7, (55.2, 65.1, 46.3, 74.1, 72.1, 40.8, 78.1)),
    Row("3B", "CWIC", 2.05, 57.2, (47.4, 60.1, 42.2, 68.3, 69.1, 38.0, 75.6)),
    Row("3B", "CWIC", 3.05, 54.7, (38.3, 58.3, 39.5, 64.3, 69.4, 39.4, 73.9)),
    Row("3B", "CWIC", 4.05, 52.5, (32.3, 57.0, 38.6, 61.5, 67.1, 37.0, 74.3)),
    Row("3B", "CWIC", 5.05, 49.8, (28.8, 53.6, 35.2, 59.1, 62.6, 37.4, 71.7)),
    Row("3B", "CWIC", 6.05, 49.4, (27.6, 53.8, 34.3, 57.7, 62.2, 38.2, 72.0)),
    Row("1B", "TEAL", 1.65, 48.1, (28.1, 55.3, 34.0, 55.2, 56.6, 35.6, 71.7)),
    Row("1B", "TEAL", 2.11, 39.1, (24.1, 51.3, 24.7, 39.0, 43.0, 30.0, 61.9)),
    Row("1B", "TEAL", 2.44, 34.0, (22.9, 48.0, 22.7, 28.9, 32.8, 28.0, 55.0)),
    Row("1B", "TEAL", 2.70, 33.2, (22.9, 48.5, 24.9, 26.3, 29.0, 28.4, 52.0)),
    Row("1B", "TEAL", 2.91, 32.8, (23.0, 49.4, 25.1, 26.0, 26.6, 29.8, 50.1)),
    Row("3B", "TEAL", 1.78, 57.4, (48.3, 58.6, 42.4, 69.8, 69.1, 38.4, 75.6)),
    Row("3B", "TEAL", 2.41, 48.5, (30.7, 54.5, 35.2, 55.4, 58.3, 36.0, 69.4)),
    Row("3B", "TEAL", 2.92, 37.6, (23.2, 50.1, 26.6, 34.5, 41.7, 26.0, 61.3)),
    Row("3B", "TEAL", 3.35, 32.4, (23.0, 50.4, 23.6, 26.4, 26.4, 26.6, 50.7)),
    Row("3B", "TEAL", 3.71, 32.2, (23.1, 49.4, 24.1, 26.4, 26.6, 24.6, 51.5)),
)
#: Its table 1, the row named "3.05x (245M)", and the million weights that it and the dense model are said to read.
TABLE_1 = Row("1B", "CWIC", 3.05, 44.2, (25.2, 51.6, 29.2, 48.3, 52.8, 33.4, 68.8))
ACTIVE_MILLIONS, DENSE_MILLIONS = 245, 1236
#: Its table 2, at 3.05x: without stripes, and "No MSE".
NO_STRIPES, NO_MSE = 45.8, 45.9
#: Its abstract: "a 15% increase in aggregate benchmark scores" over TEAL at 66%.
CLAIMED_GAIN = 15
#: FLOP version, table 1: ratio -> mean, then MMLU, ARC-C, ARC-E, HellaSwag, WinoGrande, BoolQ, SciQ.
FLOPS_TABLE_1 = {
    1: (57.1, (48.3, 54.8, 72.4, 41.1, 52.5, 53.3, 77.6)), 2: (54.5, (43.6, 47.5, 66.8, 38.8, 51.9, 60.1, 72.6)),
    3: (51.5, (40.3, 44.1, 59.9, 34.1, 49.5, 60.1, 72.3)), 4: (48.4, (37.9, 38.6, 57.5, 33.4, 50.3, 55.3, 65.5)),
    5: (46.4, (35.7, 37.3, 55.6, 30.7, 50.3, 54.8, 60.7)), 6: (44.0, (33.8, 32.1, 49.8, 29.4, 53.0, 53.6, 56.4)),
}
#: Its table 3, MMLU: the baseline at 2x to 6x, and without stripes.
FLOPS_BASELINE, FLOPS_NO_STRIPES = (48.3, 43.6, 40.3, 35.7, 33.8), (30.1, 24.9, 24.7, 25.6, 22.5)
#: What its section 4.3 sets beside SmolLM, ratio -> million weights, and what its table 2 does.
TEXT_PAIRS, TABLE_PAIRS = ((2, 360), (6, 360)), ((3, 360), (6, 135))


def find(model: str, technique: str, ratio: float) -> Row:
    """A row of table 3."""
    return next(row for row in TABLE_3 if row[:3] == (model, technique, ratio))


def published_rows() -> list[list[Any]]:
    """Ratio, each model's mean score by CWIC and by TEAL in a line between its nearest rows, and the FLOP version's mean."""
    rows = []
    for ratio in (2.05, 3.05, 4.05, 5.05, 6.05):
        row: list[Any] = [f"{ratio:g}x"]
        for model in ("1B", "3B"):
            points = sorted((r.ratio, r.average) for r in TABLE_3 if r.model == model and r.technique in ("TEAL", "dense"))
            x, y = zip(*points, strict=True)
            # the last row stands for a little more than itself: 2.91x for 3.05x
            teal = float(np.interp(ratio, x, y)) if ratio <= x[-1] + 0.15 else None
            row += [Number(find(model, "CWIC", ratio).average, ".1f"), None if teal is None else Number(teal, ".1f")]
        rows.append([*row, Number(FLOPS_TABLE_1[int(ratio)][0], ".1f")])
    return rows


def kernel(z: float) -> float:
    """K as both papers print it: H(z - 1/2) - H(z + 1/2)."""
    return float(z >= 0.5) - float(z >= -0.5)


def wrong_averages() -> list[tuple[str, float, float]]:
    """Row, printed mean and mean of its scores, where the two differ by more than rounding allows."""
    every = [(f"{r.model}, {r.technique}, {r.ratio:g}x", r.average, mean(r.scores)) for r in TABLE_3]
    every += [(f"FLOPs, {ratio}x", average, mean(scores)) for ratio, (average, scores) in FLOPS_TABLE_1.items()]
    return [row for row in every if abs(row[1] - row[2]) > ROUNDING]


def slip_rows() -> list[list[Any]]:
    """Where, what is printed, what follows from the paper's own numbers."""
    return [*_active_rows(), *_flops_rows(), *_common_rows()]


def _active_rows() -> list[list[Any]]:
    found = []
    full, teal = find("1B", "CWIC", 3.05), find("1B", "TEAL", 2.91)
    twin = next((row for row in TABLE_3 if row.scores == TABLE_1.scores and row.ratio != TABLE_1.ratio), None)
    if twin is not None:
        found.append([
            "active parameters, table 1",
            f'a 1B model at "{TABLE_1.ratio:g}x ({ACTIVE_MILLIONS}M)" with a mean of {TABLE_1.average}',
            f"these are table 3's figures at {twin.ratio:g}x: {DENSE_MILLIONS} million over {twin.ratio:g} is "
            f"{DENSE_MILLIONS / twin.ratio:.0f} million; at {full.ratio:g}x the mean is {full.average}, with "
            f"{DENSE_MILLIONS / full.ratio:.0f} million"])
    gap = full.average - teal.average
    found.append(["active parameters, abstract", f'"a {CLAIMED_GAIN}% increase" over TEAL at 66% sparsity',
                  f"{full.average} less {teal.average} (TEAL at {teal.ratio:g}x, its nearest row) are {gap:.1f} points, or "
                  f"{100 * gap / teal.average:.0f}% of TEAL's score"])
    found.append(["active parameters, section 1", 'collapse beyond "33% sparsity (3x reduction in AP)"',
                  f"a reduction of 3x is a sparsity of {100 * (1 - 1 / 3):.0f}%; a third left out is a reduction of "
                  f"{1 / (1 - 1 / 3):.1f}x"])
    found.append(["active parameters, tables 2 and 4", '"No MSE"',
                  "the text describes a run in which the MSE was added; whichever it was, it is "
                  f"{full.average - NO_MSE:.1f} points lower"])
    return found


def _flops_rows() -> list[list[Any]]:
    found = []
    expected = [scores[0] for ratio, (_, scores) in FLOPS_TABLE_1.items() if ratio > 1]
    if expected != list(FLOPS_BASELINE):
        found.append([
            "FLOPs, table 3, MMLU", "a baseline of " + ", ".join(map(str, FLOPS_BASELINE)) + " at 2x to 6x",
            "its table 1 has " + ", ".join(map(str, expected)) + ": the column starts with the dense model's and leaves out 4x"])
    if TEXT_PAIRS != TABLE_PAIRS:
        found.append(["FLOPs, section 4.3", '"2x and 6x" beside SmolLM-360M, twice',
                      "its table 2 sets " + " and ".join(f"{ratio}x beside {size}M" for ratio, size in TABLE_PAIRS)])
    return found


def _common_rows() -> list[list[Any]]:
    found = []
    if kernel(0) < 0:
        found.append(["both, section 3.3", "K(z) = H(z - 1/2) - H(z + 1/2)",
                      f"K(0) = {kernel(0):.0f}: the derivative of a step would be negative; the rectangle is the negation"])
    full = find("1B", "CWIC", 3.05)
    found.append(["both, without stripes", f"{full.average - NO_STRIPES:.1f} points lower at 3.05x (active parameters)",
                  f"near chance in the other version: MMLU of {FLOPS_NO_STRIPES[1]} at 3x, where guessing gives 25"])
    wrong = wrong_averages()
    found.append(["both, means", f"{len(TABLE_3) + len(FLOPS_TABLE_1)} means of seven scores",
                  "; ".join(f"{what}: printed {printed}, computed {own:.1f}" for what, printed, own in wrong)
                  or "all right within rounding"])
    return found
