"""Rows of the CWIC chapter on time: training steps, products and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bootstrap import Interval, resample
from sparsity_lib.experiments.claws_report import cell
from sparsity_lib.report import Number


def medians(values: Sequence[float]) -> Interval:
    """A median over rounds with its bootstrap interval."""
    values = np.asarray(values)
    drawn = np.median(values[resample(len(values))], axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.median(values)), float(low), float(high))


def decoding_rows(bench: Mapping[str, Any]) -> list[list[Any]]:
    """Thresholds, times fewer weights that their masks read, times as fast as dense; percent of a pure read's speed, both."""
    def order(name: str) -> tuple[bool, float]:
        return "imposed" not in name, bench[name]["ratio"]

    def of_memory(found: Mapping[str, Any], way: str) -> Number:
        speed = found["bytes"][way] / (found["times"][way]["median_us"] * 1e-6)
        return Number(100 * speed / found["bandwidth"], ".0f", rtol=0.5)

    return [[name, Number(bench[name]["ratio"], ".2f"), cell(medians(bench[name]["times_as_fast"]), ".2f", rtol=0.3),
             *(of_memory(bench[name], way) for way in ("dense", "granular"))] for name in sorted(bench, key=order)]


def step_rows(training: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[list[Any]]:
    """Matrix, stripe, how many times as fast a training step is as in plain PyTorch and as a dense one, MiB that each keeps."""
    return [[f"{name}, {shape[0]} × {shape[1]}", shape[2], Number(training[name]["over_plain"], ".1f"),
             Number(training[name]["over_dense"], ".2f"),
             *(Number(training[name]["saved"][kind] / 2**20, ".1f") for kind in ("plain", "ours"))]
            for name, shape in shapes.items()]


def product_rows(product: Mapping[str, Any]) -> list[list[Any]]:
    """Share kept, times as fast as the best dense product by columns and by stripes, and stripes' time over columns'."""
    found = []
    for share in sorted({p["kept"] for p in product["points"]}, reverse=True):
        fast = {p["way"]: cell(medians(p["times_as_fast"]), ".2f", rtol=0.3) for p in product["points"] if p["kept"] == share}
        slower = medians(product["stripes_over_columns"][f"{share:.3f}"])
        found.append([f"{share:.2f}", fast["columns"], fast["stripes"], cell(slower, ".2f", rtol=0.3)])
    return found
