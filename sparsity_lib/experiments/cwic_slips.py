"""What both CWIC papers print, as data, and the places where their numbers do not fit together."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsity_lib.report import Number

#: Active-parameter version, table 3: (model, technique, ratio) -> mean of the seven tasks in percent.
TABLE_3: dict[tuple[str, str, float], float] = {
    ("1B", "dense", 1.0): 53.1, ("3B", "dense", 1.0): 61.7,
    ("1B", "CWIC", 2.05): 49.2, ("1B", "CWIC", 3.05): 47.5, ("1B", "CWIC", 4.05): 46.1, ("1B", "CWIC", 5.05): 44.2,
    ("1B", "CWIC", 6.05): 43.8,
    ("3B", "CWIC", 2.05): 57.2, ("3B", "CWIC", 3.05): 54.7, ("3B", "CWIC", 4.05): 52.5, ("3B", "CWIC", 5.05): 49.8,
    ("3B", "CWIC", 6.05): 49.4,
    ("1B", "TEAL", 1.65): 48.1, ("1B", "TEAL", 2.11): 39.1, ("1B", "TEAL", 2.44): 34.0, ("1B", "TEAL", 2.70): 33.2,
    ("1B", "TEAL", 2.91): 32.8,
    ("3B", "TEAL", 1.78): 57.4, ("3B", "TEAL", 2.41): 48.5, ("3B", "TEAL", 2.92): 37.6, ("3B", "TEAL", 3.35): 32.4,
    ("3B", "TEAL", 3.71): 32.2,
}
#: Its table 1, the row named "3.05x (245M)": mean and seven tasks; and the row of table 3 at 5.05x.
TABLE_1_SMALL = (44.2, 25.2, 51.6, 29.2, 48.3, 52.8, 33.4, 68.8)
TABLE_3_AT_5 = (44.2, 25.2, 51.6, 29.2, 48.3, 52.8, 33.4, 68.8)
#: Million weights of the dense model, as table 1 has it.
DENSE_MILLIONS = 1236
#: FLOP version, table 1: ratio -> mean, MMLU; and table 3's MMLU "baseline" at 2x to 6x.
FLOPS_TABLE_1 = {1: (57.1, 48.3), 2: (54.5, 43.6), 3: (51.5, 40.3), 4: (48.4, 37.9), 5: (46.4, 35.7), 6: (44.0, 33.8)}
FLOPS_TABLE_3_MMLU = (48.3, 43.6, 40.3, 35.7, 33.8)


def published_rows() -> list[list[Any]]:
    """Ratio, and each model's mean score by CWIC and by TEAL in a line between its nearest rows."""
    rows = []
    for ratio in (2.05, 3.05, 4.05, 5.05, 6.05):
        row: list[Any] = [f"{ratio:g}x"]
        for model in ("1B", "3B"):
            points = sorted((r, score) for (m, way, r), score in TABLE_3.items() if m == model and way in ("TEAL", "dense"))
            x, y = zip(*points, strict=True)
            # the last row stands for a little more than itself: 2.91x for 3.05x
            teal = float(np.interp(ratio, x, y)) if ratio <= x[-1] + 0.15 else None
            row += [Number(TABLE_3[model, "CWIC", ratio], ".1f"), None if teal is None else Number(teal, ".1f")]
        rows.append(row)
    return rows


def kernel(z: float) -> float:
    """K as both papers print it: H(z - 1/2) - H(z + 1/2)."""
    def step(value: float) -> float:
        return float(value >= 0)

    return step(z - 0.5) - step(z + 0.5)


def slip_rows() -> list[list[Any]]:
    """Where, what is printed, what follows from the paper's own numbers."""
    found = []
    if TABLE_1_SMALL == TABLE_3_AT_5:
        found.append([
            "active parameters, table 1", 'a 1B model at "3.05x (245M)" with a mean of 44.2',
            f"these are table 3's figures at 5.05x: {DENSE_MILLIONS} million over 5.05 is {DENSE_MILLIONS / 5.05:.0f} million; "
            f"at 3.05x the mean is {TABLE_3['1B', 'CWIC', 3.05]}, with {DENSE_MILLIONS / 3.05:.0f} million"])
    expected = [mmlu for ratio, (_, mmlu) in FLOPS_TABLE_1.items() if ratio > 1]
    if expected != list(FLOPS_TABLE_3_MMLU):
        found.append([
            "FLOPs, table 3, MMLU", "a baseline of " + ", ".join(map(str, FLOPS_TABLE_3_MMLU)) + " at 2x to 6x",
            "its table 1 has " + ", ".join(map(str, expected)) + ": the column starts with the dense model's and leaves out 4x"])
    if kernel(0) < 0:
        found.append(["both, section 3.3", "K(z) = H(z - 1/2) - H(z + 1/2)",
                      f"K(0) = {kernel(0):.0f}: the derivative of a step would be negative; the rectangle is the negation"])
    gap = TABLE_3["1B", "CWIC", 3.05] - TABLE_3["1B", "TEAL", 2.91]
    found.append(["active parameters, abstract", "15% above TEAL at 3x",
                  f"{TABLE_3['1B', 'CWIC', 3.05]} less {TABLE_3['1B', 'TEAL', 2.91]} are {gap:.1f} points, or "
                  f"{100 * gap / TABLE_3['1B', 'TEAL', 2.91]:.0f}% of TEAL's score"])
    found.append(["active parameters, tables 2 and 4", '"No MSE"', "the text describes a run in which the MSE was added"])
    found.append(["FLOPs, section 4.3", '"2x and 6x" beside SmolLM-360M, twice',
                  "its table 2 sets 3x beside 360M and 6x beside 135M"])
    return found
