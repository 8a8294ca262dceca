"""Rows and points of the comparison: quality at equal shares, overheads, tasks, protocol effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult, TaskResult
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments import compare_granular
from sparsity_lib.experiments.claws_report import cell, label, points, short
from sparsity_lib.experiments.compare_common import BOUNDS, EVERY_METHOD, WITH_HEAD
from sparsity_lib.overheads import Overheads
from sparsity_lib.report import Number

Data = Mapping[str, Any]
#: How far beyond its measured points a curve is read: thresholds meet their share within a hundredth or so.
SLACK = 0.012
#: Those of the papers, and the same carried on to the head.
PUBLISHED = tuple(m for m in EVERY_METHOD if m not in (*BOUNDS, *WITH_HEAD))
SINGLE = (*PUBLISHED, *WITH_HEAD)
#: What tables list: those, the bounds, and what was trained.
LISTED = (*EVERY_METHOD, compare_granular.METHOD)


#: What a sparsity can be a share of -> in words. The first is how most papers state it, the last how this book does.
COUNTS = {"sites": "entries at the method's own sites", "ffn": "weights of the FFN", "linears": "weights of all linear layers",
          "skipped": "all weights"}


def counted(shares: Data, count: str) -> float | None:
    """The share that was skipped in one of the `COUNTS`; None where a method is not counted that way."""
    if count == "sites":
        return float(np.mean(list(shares["sites"].values()))) if shares.get("sites") else None
    return shares.get(count)


@dataclass(frozen=True)
class Curve:
    """One method on one model: shares in one of the `COUNTS` [points], summed KL [points, sequences], tokens [sequences]."""

    shares: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(found: Sequence[Data], count: str = "skipped") -> Curve | None:
        """From stored points, those without quality or that count left out; None where none is left."""
        kept = [(share, p) for p in found if "quality" in p and (share := counted(p["shares"], count)) is not None]
        if not kept:
            return None
        kept.sort(key=lambda each: each[0])
        quality = [Quality.from_json(p["quality"]) for _, p in kept]
        return Curve(np.array([share for share, _ in kept]), np.array([q.kl for q in quality]),
                     np.array(quality[0].tokens, dtype=float))

    def at(self, share: float) -> np.ndarray | None:
        """Each sequence's summed KL at a share, log-linear between measured points; None beyond them."""
        if not self.shares[0] - SLACK <= share <= self.shares[-1] + SLACK:
            return None
        logs = np.log(np.maximum(self.kl, 1e-12))
        return np.exp([np.interp(share, self.shares, each) for each in logs.T])

    def kl_at(self, share: float) -> Interval | None:
        """Mean KL at a share in nats per token."""
        found = self.at(share)
        return None if found is None else ratio_interval(found, self.tokens)


def curve(data: Data, model: str, method: str, count: str = "skipped") -> Curve | None:
    """One stored method."""
    return Curve.of(data[model]["methods"][method], count)


def known(data: Data, model: str, methods: Sequence[str]) -> list[str]:
    """Of `methods`, those that a model has: thresholds were trained for one model only."""
    return [method for method in methods if method in data[model]["methods"]]


def quality_points(data: Data, methods: Sequence[str]) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """model -> method -> [(share skipped, KL)]: what `figures.claws.sweep` draws."""
    return {model: {method: [(p["shares"]["skipped"], Quality.from_json(p["quality"]).divergence())
                             for p in data[model]["methods"][method] if "quality" in p] for method in known(data, model, methods)}
            for model in data}


def quality_rows(data: Data, shares: Sequence[float], methods: Sequence[str] = LISTED) -> list[list[Any]]:
    """Model, method; KL at each share without its interval, None where the method cannot reach it."""
    rows = []
    for model in data:
        for method in known(data, model, methods):
            own = curve(data, model, method)
            found = [None if own is None else own.kl_at(share) for share in shares]
            cells = [None if kl is None else Number(kl.value, ".3f", rtol=0.05) for kl in found]
            rows.append([short(model), label(method), *cells])
    return rows


#: What else is stored of every point -> its sums by sequence, and what turns their mean into it.
OTHERS = {"perplexity": ("nll", np.exp), "agreement": ("agree", lambda mean: 100 * mean)}


def other_at(found: Sequence[Data], what: str, share: float) -> Interval | None:
    """Perplexity or agreement (%) at a share, its sums linear between measured points; None beyond them."""
    line = Curve.of(found)
    if line is None or line.at(share) is None:
        return None
    name, transform = OTHERS[what]
    points = sorted((p for p in found if "quality" in p), key=lambda p: p["shares"]["skipped"])
    sums = np.array([p["quality"][name] for p in points])
    return ratio_interval([np.interp(share, line.shares, each) for each in sums.T], line.tokens, transform=transform)


def other_rows(data: Data, what: str, shares: Sequence[float], methods: Sequence[str] = LISTED) -> list[list[Any]]:
    """Model, method; one of `OTHERS` at each share with its interval, the dense model's first and at every share."""
    rows = []
    for model in data:
        (name, transform), dense = OTHERS[what], data[model]["dense"]
        own = ratio_interval(dense[name], dense["tokens"], transform=transform)
        rows.append([short(model), label("dense"), *[_other_cell(own)] * len(shares)])
        for method in known(data, model, methods):
            found = [other_at(data[model]["methods"][method], what, share) for share in shares]
            rows.append([short(model), label(method), *map(_other_cell, found)])
    return rows


def _other_cell(found: Interval | None) -> Number | None:
    """Perplexities beyond use without decimals."""
    return None if found is None else cell(found, ".1f" if found.high < 1000 else ".2g")


def with_search(data: Data, search: Data) -> dict[str, Any]:
    """The stored methods, and "spread", what the search chose, along the shares where it was held out."""
    return {model: {**own, "methods": {**own["methods"], "spread": search["models"][model]["held out"]["chosen"]["points"]}}
            for model, own in data.items()}


def reach_rows(data: Data, methods: Sequence[str] = LISTED) -> list[list[Any]]:
    """Model, method, the largest share asked for that it reaches (%), and why it ends there: of those that do not reach all."""
    rows = []
    for model in data:
        for method in known(data, model, methods):
            found = data[model]["methods"][method]
            reached = [100 * p["share"] for p in found if "quality" in p]
            reason = next((p["reason"] for p in found if "reason" in p), None)
            if reason is not None:
                rows.append([short(model), label(method), Number(max(reached, default=0.0), ".0f"), reason])
    return rows


def nearest(found: Sequence[Data], share: float) -> Data | None:
    """The point asked for at a share, if it was reached."""
    return next((p for p in found if abs(p["share"] - share) < 1e-9 and "quality" in p), None)


def extra_rows(data: Data, share: float, methods: Sequence[str] = LISTED) -> list[list[Any]]:
    """Model, method; at a share (or its largest) the memory and operations that it adds, and those of these that choose, in
    percent of the dense model's."""
    rows = []
    for model in data:
        for method in known(data, model, methods):
            own = [p for p in data[model]["methods"][method] if "quality" in p]
            point = nearest(own, share) or (own[-1] if own else None)
            if point is None:
                continue
            extra = Overheads.from_json(point["shares"]["extra"])
            rows.append([short(model), label(method), Number(100 * point["shares"]["skipped"], ".0f"),
                         Number(100 * extra.memory, ".2f"), Number(100 * extra.operations, ".2f"),
                         Number(100 * extra.choosing / extra.dense_operations, ".2f")])
    return rows


def counted_rows(data: Data, share: float, methods: Sequence[str] = PUBLISHED) -> list[list[Any]]:
    """The same masks in four counts (%): entries dropped at the method's sites, of the FFN, of all linears, of all weights."""
    rows = []
    for model in data:
        for method in methods:
            point = nearest(data[model]["methods"][method], share)
            if point is None or "sites" not in point["shares"]:
                continue
            rows.append([short(model), label(method), *(Number(100 * counted(point["shares"], c), ".0f") for c in COUNTS)])
    return rows


def counted_points(data: Data, methods: Sequence[str], counts: Sequence[str]) -> dict[str, dict[str, dict[str, list]]]:
    """model -> count -> method -> [(share skipped in that count, KL)]: the same masks, stated in several ways."""
    def points(model: str, method: str, count: str) -> list[tuple[float, Interval]]:
        return [(counted(p["shares"], count), Quality.from_json(p["quality"]).divergence())
                for p in data[model]["methods"][method] if "quality" in p and counted(p["shares"], count) is not None]

    return {model: {count: {method: points(model, method, count) for method in methods} for count in counts} for model in data}


def recounted_rows(data: Data, share: float, methods: Sequence[str], base: str = "teal") -> list[list[Any]]:
    """Model, method; its KL over the base method's (paired over sequences) at the base's masks' share in each count.

    The base skips `share` of all weights; its own masks say what that is in every other count. None where a method does not
    reach it.
    """
    rows = []
    for model in data:
        point = nearest(data[model]["methods"][base], share)
        for method in methods:
            row: list[Any] = [short(model), label(method)]
            for count in COUNTS:
                at = None if point is None else counted(point["shares"], count)
                own, other = (curve(data, model, m, count) for m in (method, base))
                kl = None if at is None or own is None or other is None else own.at(at)
                row.append(None if kl is None else cell(ratio_interval(kl, other.at(at)), ".2f"))
            rows.append(row)
    return rows


def best_single(data: Data, model: str, share: float, methods: Sequence[str] = SINGLE) -> str | None:
    """The method with the least KL at a share, of those that reach it."""
    found = {}
    for method in methods:
        own = curve(data, model, method)
        if own is not None and (kl := own.kl_at(share)) is not None:
            found[method] = kl.value
    return min(found, key=found.get) if found else None


def at_share(row: Data) -> str:
    """A method, a part that it was left without, and the share that it was asked for."""
    words = [label(row["method"]), *([row["part"]] if "part" in row else [])]
    return ", ".join([*words, *([f"{100 * row['share']:.0f}%"] if row["share"] else [])])


def nine(found: Data) -> BenchmarkResult:
    """The three stored runs of one item as one result."""
    runs = [BenchmarkResult.from_dict(found["results"][name]) for name in ("scap7", "openbookqa", "mmlu")]
    tasks: dict[str, TaskResult] = {name: task for run in runs for name, task in run.tasks.items()}
    return BenchmarkResult(tasks, runs[0].limit, runs[0].seed, runs[0].backend, sum(run.seconds for run in runs), runs[0].lm_eval)


def task_rows(data: Data) -> list[list[Any]]:
    """Model, method and share, from small shares to large; mean of nine tasks (%), its difference to dense in points, mean of
    SCAP's seven (%)."""
    rows = []
    for model, found in data.items():
        dense = nine(found[0])
        for row in sorted(found, key=lambda row: row["share"]):
            start = [short(model), at_share(row)]
            if "results" not in row:
                rows.append([*start, None, None, None])
                continue
            own = nine(row)
            gap = None if row is found[0] else points(own, dense, "book9")
            rows.append([*start, Number(100 * own.score("book9").mean, ".1f"), gap, Number(100 * own.score("scap7").mean, ".1f")])
    return rows
