"""Every stored point of quality against weights skipped, whichever chapter made it: what the explorer and the choice read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from sparsity_lib import results
from sparsity_lib.bench.timing import by_length
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments import claws_report, scap_report, teal_report
from sparsity_lib.experiments.common import MODELS

#: Methods of the sweep that a reader would choose among, and two bounds.
SWEPT = ("cats", "claws", "larosa", "inputs_topk", "oracle", "random")
#: Not to be chosen: they read what they would skip, or do not look.
BOUNDS = ("oracle", "random")
#: Where a method decides: how its speed is measured, by settings of `bench/decode`.
PLACE = {"cats": "neurons", "claws": "neurons", "oracle": "neurons", "random": "neurons"}


@dataclass(frozen=True)
class Point:
    """skipped: share of all weights; own: share of its own site's entries; kl: nats per token with interval; result: its file."""

    skipped: float
    own: float
    kl: Interval
    perplexity: float
    result: str


Curves = dict[str, dict[str, list[Point]]]


def _sweep(stored: results.Result) -> Curves:
    densities = stored.manifest["params"]["densities"]
    return {model: {method: [_point(stored, claws_report.quality_of(stored.data, model, method, d),
                                    stored.data[model][method]["shares"][str(d)]["skipped"],
                                    _own(stored.data[model][method]["shares"][str(d)]["sites"])) for d in densities]
                    for method in SWEPT} for model in MODELS}


def _own(sites: Mapping[str, float]) -> float:
    return float(np.mean(list(sites.values())))


def _teal(stored: results.Result) -> Curves:
    targets, names = stored.manifest["params"]["targets"], {"uniform": "teal", "greedy, by output": "teal_greedy"}
    return {model: {method: [_point(stored, teal_report.quality(stored.data, model, way, t), shares["skipped"], _own(shares["sites"]))
                             for t in targets for shares in [stored.data[model][way]["shares"][str(t)]]]
                    for way, method in names.items()} for model in MODELS}


def _scap(stored: results.Result) -> Curves:
    return {model: {"scap": [_point(stored, scap_report.quality(p), p["skipped"], p["ffn"])
                             for p in scap_report.on_front(scap_report.of_method(stored.data[model], "scap"))]} for model in MODELS}


def _point(stored: results.Result, quality: Quality, skipped: float, own: float) -> Point:
    return Point(skipped, own, quality.divergence(), quality.perplexity().value, stored.name)


#: Stored result -> how to read its points.
SOURCES: dict[str, Callable[[results.Result], Curves]] = {"claws_sweep": _sweep, "teal_allocation": _teal, "scap_grid": _scap}


@cache
def curves() -> Curves:
    """Model -> method -> points by rising share of weights skipped, from every source that is there."""
    found: Curves = {model: {} for model in MODELS}
    for name, read in SOURCES.items():
        if name in results.names():
            for model, methods in read(results.load(name)).items():
                for method, points in methods.items():
                    found[model][method] = sorted(points, key=lambda p: p.skipped)
    return found


def at(points: list[Point], skipped: float) -> Point | None:
    """A curve read at one share: log KL and the rest are linear between neighbours; None outside of what was measured."""
    shares = [p.skipped for p in points]
    if not shares[0] <= skipped <= shares[-1]:
        return None

    def read(values: list[float], log: bool = True) -> float:
        found = np.interp(skipped, shares, np.log(np.maximum(values, 1e-12)) if log else values)
        return float(np.exp(found) if log else found)

    kl = Interval(*(read([getattr(p.kl, end) for p in points]) for end in ("value", "low", "high")))
    return Point(skipped, read([p.own for p in points], log=False), kl, read([p.perplexity for p in points]), points[0].result)


@cache
def speeds() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Model -> "inputs" or "neurons" -> [(share of all weights skipped, times as fast as dense)], measured in our decoder,
    medians over prompts; the dense decoder first.
    """
    if "bench/decode" not in results.names():
        return {}
    data = results.load("bench/decode").data
    weights = {model: next(iter(found["claws"]["shares"].values()))["dense_weights"]
               for model, found in results.load("claws_sweep").data.items()} if "claws_sweep" in results.names() else {}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for model in weights:
        found[model] = {"inputs": [(0.0, 1.0)], "neurons": [(0.0, 1.0)]}
        for setting, each in data.get(model, {}).items():
            kind = setting.split()[0]
            if kind not in found[model]:
                continue
            points = list(by_length(each["prompts"]).values())
            saved = points[0]["bytes"]["dense"] - points[0]["bytes"]["sparse"]
            found[model][kind].append((saved / (2 * weights[model]), float(np.median([p["ratio"] for p in points]))))
        for kind in found[model].values():
            kind.sort()
    return found


def speed(model: str, method: str, skipped: float) -> float | None:
    """Times as fast as dense: time is taken to be linear in the share between measured settings; None beyond them."""
    measured = speeds().get(model, {}).get(PLACE.get(method, "inputs"), [])
    if len(measured) < 2 or not 0 <= skipped <= measured[-1][0] * 1.02:
        return None
    shares, ratios = zip(*measured, strict=True)
    return float(1 / np.interp(skipped, shares, [1 / r for r in ratios]))
