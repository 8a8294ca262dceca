"""Rows of the N:M chapter on tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.evaluate.bootstrap import Interval, resample
from sparsity_lib.experiments.claws_report import cell, points, short
from sparsity_lib.experiments.nm_report import WORDS, named
from sparsity_lib.report import Number

#: The tasks that the study names: lost most of all, and helped by VAR.
HARD, HELPED = ("arc_challenge", "hellaswag"), ("winogrande", "boolq")


def solved(results: Mapping[str, Any], task: str) -> float:
    """A stored score."""
    return BenchmarkResult.from_dict(results[task]).score(task).mean


def relative_drop(
    found: Sequence[Mapping[str, Any]], place: int, task: str, only: Callable[[str], bool] = lambda task: True
) -> np.ndarray:
    """1 - score / dense score of a point, the estimate first and then its resamples, paired over documents."""
    dense, own = (BenchmarkResult.from_dict(found[i]["ranked"][task]) for i in (0, place))
    total = np.zeros(1 + len(resample(2)))
    base = np.zeros_like(total)
    members = [name for name in dense.tasks if only(name)]
    for number, member in enumerate(members):
        metric = next(iter(dense.tasks[member].values))
        a, b = (np.asarray(r.tasks[member].values[metric]) for r in (own, dense))
        drawn = resample(len(a), seed=number)
        total += np.concatenate([[a.mean()], a[drawn].mean(1)]) / len(members)
        base += np.concatenate([[b.mean()], b[drawn].mean(1)]) / len(members)
    return 1 - total / np.maximum(base, 1e-12)


def spread(drawn: np.ndarray) -> Interval:
    """The first entry with the 95% range of the others."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return Interval(float(drawn[0]), float(min(low, drawn[0])), float(max(high, drawn[0])))


def place_of(found: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any] | None) -> int:
    """Where a point is in the stored list."""
    return next(i for i, each in enumerate(found) if each["point"] == wanted)


def task_name(point: Mapping[str, Any] | None) -> str:
    """A point with nothing added, in words."""
    if point is None:
        return "dense"
    if point["on"] == "weights":
        return f"weights {point['pattern']}, {WORDS[point['score']]}"
    return f"activations {point['pattern']}"


def task_rows(data: Mapping[str, Any], group: str) -> list[list[Any]]:
    """Model, what is pruned by plain |x| or on weights; mean of the ranked tasks (%), relative drop (%), LAMBADA and TriviaQA (%)
    with their difference to the dense model in points, where the model was made to write."""
    rows = []
    for model, points_of in data.items():
        dense = {task: BenchmarkResult.from_dict(r) for task, r in points_of[0]["written"].items()}
        for place, found in enumerate(points_of):
            if added(found["point"]):
                continue
            mean = BenchmarkResult.from_dict(found["ranked"][group]).score(group).mean
            lost = spread(100 * relative_drop(points_of, place, group))
            row = [short(model), task_name(found["point"]), Number(100 * mean, ".1f")]
            row.append(None if place == 0 else cell(lost, ".1f", atol=0.3))
            for task in ("lambada_openai", "triviaqa"):
                if task not in found.get("written", ()):
                    row += [None, None]
                    continue
                own = BenchmarkResult.from_dict(found["written"][task])
                gap = None if place == 0 else points(own, dense[task], task)
                row += [Number(100 * own.score(task).mean, ".1f"), gap]
            rows.append(row)
    return rows


def added(point: Mapping[str, Any] | None) -> bool:
    """Whether a point prunes activations by more than plain |x|."""
    return point is not None and point["on"] == "activations" and named(point) != "nothing"


def change(found: Sequence[Mapping[str, Any]], place: int, base: int, group: str, *tasks: str) -> Interval:
    """Mean score of some tasks (all without names) at a point less that at another, in percent of the dense model's; paired."""
    only = (lambda task: task in tasks) if tasks else (lambda task: True)
    return spread(100 * (relative_drop(found, base, group, only) - relative_drop(found, place, group, only)))


def added_rows(data: Mapping[str, Any], group: str, pattern: str) -> list[list[Any]]:
    """Model, what is added to plain |x|; mean of the ranked tasks (%), relative drop (%), and what it changes against plain |x|:
    of all seven tasks, of ARC-Challenge and HellaSwag, of WinoGrande and BoolQ, in percent of the dense scores; best first."""
    rows = []
    for model, points_of in data.items():
        base = place_of(points_of, {"on": "activations", "pattern": pattern})
        own = [base, *(i for i, found in enumerate(points_of) if added(found["point"]) and found["point"]["pattern"] == pattern)]
        drops = {i: spread(100 * relative_drop(points_of, i, group)) for i in own}
        for i in sorted(own, key=lambda i: drops[i].value):
            mean = BenchmarkResult.from_dict(points_of[i]["ranked"][group]).score(group).mean
            changes = [None] * 3 if i == base else [cell(change(points_of, i, base, group, *tasks), "+z.1f", atol=0.3)
                                                   for tasks in ((), HARD, HELPED)]
            name = named(points_of[i]["point"])
            rows.append([short(model), name, Number(100 * mean, ".1f"), cell(drops[i], ".1f", atol=0.3), *changes])
    return rows
