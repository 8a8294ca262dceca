"""Every stored point of quality against weights skipped, whichever chapter made it: what the explorer and the choice read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sparsity_lib import results, style
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments import scap_report, teal_report
from sparsity_lib.experiments.common import MODELS
from sparsity_lib.pareto import front

#: Methods of the CLAWS chapter's sweep that a reader would choose among, and two bounds.
SWEPT = ("cats", "claws", "larosa", "inputs_topk", "oracle", "random")
#: Not to be chosen: they read what they would skip, or do not look.
BOUNDS = ("oracle", "random")
#: Its thresholds are learned: shown in the explorer, never ranked among methods without training.
TRAINED = ("cwic",)
#: Where entries are dropped -> in words.
SITES = {
    "neurons": "FFN neurons", "up": "gate and up inputs", "down": "down inputs", "ffn": "FFN inputs",
    "inputs": "all linear inputs", "head": "all linear inputs and the head's", "stripes": "inputs by stripe of outputs",
}
_OF_KINDS = {"neurons": {"gate"}, "up": {"up_in"}, "down": {"down_in"}, "ffn": {"up_in", "down_in"}, "stripes": {"stripes"}}
#: SCAP's two groups: parts of what it drops, which the explorer shows and the choice does not rank.
PARTS = ("up", "down")
#: Results of one protocol, shares and text the same for every method: where there are such curves, only they are ranked.
TOGETHER = ("compare_quality", "compare_search")
#: A kind of site at which less than this share is dropped is not one of the method's.
LEAST = 0.01


@dataclass(frozen=True)
class Point:
    """skipped: share of all weights left unread, less what rotations read; sites: kind of site -> share of its entries dropped;
    kl: nats per token."""

    skipped: float
    sites: Mapping[str, float]
    kl: Interval
    perplexity: float


@dataclass(frozen=True)
class Curve:
    """One method at one choice of sites: its points by rising share of weights skipped, and the stored result they are from."""

    method: str
    sites: str
    points: tuple[Point, ...]
    result: str

    @property
    def name(self) -> str:
        """A key of its own: the method, and the sites where it has several."""
        return f"{self.method} {self.sites}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites at which it drops something anywhere along the curve."""
        return tuple(kind for kind in self.points[0].sites if any(p.sites[kind] >= LEAST for p in self.points))

    def own(self, point: Point) -> float:
        """Mean share dropped at its kinds of sites."""
        return float(np.mean([point.sites[kind] for kind in self.kinds]))

    @property
    def label(self) -> str:
        """The method as a reader knows it."""
        return style.look(self.method).label

    def at(self, skipped: float) -> Point | None:
        """The curve read at one share: logarithms of KL and perplexity, and shares as they are, lie on lines between neighbours;
        None outside of what was measured."""
        shares = [p.skipped for p in self.points]
        if not shares[0] <= skipped <= shares[-1]:
            return None

        def read(values: list[float]) -> float:
            return float(np.interp(skipped, shares, values))

        def read_log(values: list[float]) -> float:
            return float(np.exp(read(list(np.log(np.maximum(values, 1e-12))))))

        kl = Interval(*(read_log([getattr(p.kl, end) for p in self.points]) for end in ("value", "low", "high")))
        sites = {kind: read([p.sites[kind] for p in self.points]) for kind in self.points[0].sites}
        return Point(skipped, sites, kl, read_log([p.perplexity for p in self.points]))


def where(sites: Mapping[str, float]) -> str:
    """The name in `SITES` of kinds of sites of which something is dropped."""
    kinds = frozenset(kind for kind, share in sites.items() if share >= LEAST)
    for name, wanted in _OF_KINDS.items():
        if kinds == wanted:
            return name
    return "head" if "head_in" in kinds else "inputs"


def _point(quality: Quality, shares: Mapping[str, Any]) -> Point:
    """What a rotation reads counts as read, as in the comparison; the CLAWS chapter's runs keep it apart."""
    rotations = shares.get("transform_weights", 0) / shares.get("dense_weights", 1)
    return Point(shares["skipped"] - rotations, shares["sites"], quality.divergence(), quality.perplexity().value)


def _curve(method: str, points: list[Point], result: str) -> Curve:
    points = sorted((p for p in points if p.skipped > 0), key=lambda p: p.skipped)  # below: it reads more than the dense model
    return Curve(method, where(points[-1].sites), tuple(points), result)


Found = dict[str, list[Curve]]


def _sweep(stored: results.Result) -> Found:
    def points(found: Mapping[str, Any]) -> list[Point]:
        return [_point(Quality.from_json(found["quality"][d]), shares) for d, shares in found["shares"].items()]

    return {model: [_curve(method, points(stored.data[model][method]), stored.name) for method in SWEPT] for model in MODELS}


def _teal(stored: results.Result) -> Found:
    def points(model: str, way: str) -> list[Point]:
        shares = stored.data[model][way]["shares"]
        return [_point(teal_report.quality(stored.data, model, way, float(t)), found) for t, found in shares.items()]

    ways = {"teal": "uniform", "teal_greedy": "greedy, by output"}
    return {model: [_curve(method, points(model, way), stored.name) for method, way in ways.items()] for model in MODELS}


def _scap(stored: results.Result) -> Found:
    """The best of both sparsities, and each of the two alone."""
    found: Found = {}
    for model in MODELS:
        own = [(p, _point(scap_report.quality(p), p)) for p in scap_report.of_method(stored.data[model], "scap")]
        every = [point for _, point in own]
        best = front([p.skipped for p in every], [-p.kl.value for p in every])
        parts = [[every[i] for i in best], *([point for p, point in own if p[other] == 0] for other in PARTS)]
        found[model] = [_curve("scap", part, stored.name) for part in parts]
    return found


def _comparison(stored: results.Result) -> Found:
    """Every method under one protocol; pruned weights, which have no sites, left out."""
    found: Found = {}
    for model in MODELS:
        methods = {name: [(p["quality"], shares) for p in points if "quality" in p and "sites" in (shares := _sited(name, p))]
                   for name, points in stored.data[model]["methods"].items() if name in style.LOOKS}
        own = {name: [_point(Quality.from_json(quality), shares) for quality, shares in points]
               for name, points in methods.items()}
        found[model] = [_curve(name, points, stored.name) for name, points in own.items()
                        if sum(point.skipped > 0 for point in points) > 1]
    return found


def _search(stored: results.Result) -> Found:
    """The combination of parts that the search chose, on text that it has not seen."""
    def points(found: Mapping[str, Any]) -> list[Point]:
        return [_point(Quality.from_json(p["quality"]), p["shares"]) for p in found["points"] if "quality" in p]

    data = stored.data["models"]
    return {model: [_curve("spread", points(data[model]["held out"]["chosen"]), stored.name)] for model in MODELS}


def _sited(method: str, point: Mapping[str, Any]) -> Mapping[str, Any]:
    """A point's shares; trained thresholds differ from stripe to stripe of outputs, so theirs is that of weights."""
    shares = point.get("shares", {})
    return {**shares, "sites": {"stripes": shares["skipped"]}} if method in TRAINED and shares else shares


#: Stored result -> how to read its curves. A later one takes the place of an earlier one's curve of the same name.
SOURCES: dict[str, Callable[[results.Result], Found]] = {
    "claws_sweep": _sweep, "teal_allocation": _teal, "scap_grid": _scap, "compare_quality": _comparison,
    "compare_search": _search,
}


@cache
def curves() -> dict[str, dict[str, Curve]]:
    """Model -> name -> curve, from every source that is there."""
    found: dict[str, dict[str, Curve]] = {model: {} for model in MODELS}
    for name, read in SOURCES.items():
        if name in results.names():
            for model, own in read(results.load(name)).items():
                found[model].update({curve.name: curve for curve in own})
    return {model: own for model, own in found.items() if own}


@cache
def dense_perplexities() -> dict[str, float]:
    """Model -> perplexity of the dense model, from the latest source that keeps it."""
    found = {}
    for name in ("scap_grid", "compare_quality"):
        if name in results.names():
            data = results.load(name).data
            found.update({model: Quality.from_json(data[model]["dense"]).perplexity().value
                          for model in MODELS if "dense" in data.get(model, ())})
    return found
