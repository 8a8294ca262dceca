"""One row a model that really runs: the sparsest of a few SCAP settings whose task score stays within one percent.

The setting is chosen by bisection on the even half of the units and reported on the odd half, so that the number shown
was not itself what was searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sparsity_lib import sweep
from sparsity_lib.accounting import recorded, summarise
from sparsity_lib.assets.models import load_model
from sparsity_lib.evaluate.benchmarks import BenchmarkResult, run_benchmarks
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval, resample
from sparsity_lib.experiments import common, scap_common, small_networks
from sparsity_lib.experiments.scap_networks import Network, Scores, Sentences
from sparsity_lib.fit import fit_many
from sparsity_lib.install import installed
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import GATE, IN_PROJ_IN, find_sites
from sparsity_lib.sweep import kept_open

#: Allowed relative loss, as in the paper.
MARGIN = 0.01
GROUP, LIMIT = "scap7", 100
#: Targets from mild to strong; gated networks are not centred, the others on their mode.
LADDER = ((0.1, 0.2), (0.2, 0.3), (0.2, 0.5), (0.3, 0.5), (0.4, 0.5), (0.4, 0.6), (0.5, 0.6), (0.5, 0.7), (0.6, 0.7))


class Tasks:
    """A decoder on the paper's seven tasks; a unit is a document. Its weights may be rounded to int8 first.

    It is calibrated in float32 and run in bfloat16; with `one_copy`, for large models, calibrated in bfloat16 too.
    """

    scale = "share"

    def __init__(self, name: str, bits: int | None = None, limit: int = LIMIT, one_copy: bool = False) -> None:
        self.limit = limit
        self.model, self.tokenizer = load_model(name, dtype=torch.bfloat16)
        self.fitted = self.model if one_copy else load_model(name)[0]
        if bits is not None:
            scap_common.quantise(self.fitted, bits)
            self.model.load_state_dict(self.fitted.state_dict())  # the same weights

    def fit(self, recipes: Sequence[Recipe]) -> list[Plan]:
        return fit_many(recipes, self.fitted, self.tokenizer, **common.CALIBRATION)

    def score(self, plan: Plan | None) -> Scores:
        if plan is None:
            return self._scores(self._run(), None)
        with installed(self.model, plan), recorded(self.model) as counted:
            result = self._run()
            return self._scores(result, scap_common.shares(summarise(self.model, counted())))

    def _run(self) -> BenchmarkResult:
        return run_benchmarks(self.model, self.tokenizer, GROUP, limit=self.limit)

    def _scores(self, result: BenchmarkResult, shares: dict[str, Any] | None) -> Scores:
        right = [value for name in sorted(result.tasks) for value in result.tasks[name].values["acc"]]
        return Scores([1 - r for r in right], right, [1.0] * len(right), shares, {"score": result.score(GROUP).mean})


@dataclass(frozen=True)
class Entry:
    """A row of the table: what the network is, how it opens, whether it was trained here, and its settings."""

    what: str
    load: Callable[[], Network]
    trained_here: bool = False
    centered: bool = False
    attention: bool = False
    mixer: bool = False

    def points(self) -> list[dict[str, Any]]:
        if self.mixer:
            return [{"method": "mixer", "in": up, "out": down} for up, down in LADDER]
        extra = {"center": "mode"} if self.centered else {}
        points = [{"method": "scap", "up": up, "down": down, **extra} for up, down in LADDER]
        return [{**p, "attention": p["up"]} if self.attention else p for p in points]


def entries() -> dict[str, Entry]:
    """All rows by name; the small trained networks are those that `small_networks` offers."""
    found = {
        "smollm2-135m-instruct": Entry("decoder, 4-bit weights (Q4_1, dequantised)", partial(Tasks, "smollm2-135m-instruct")),
        "smollm2 int8": Entry("decoder, the 4-bit weights rounded once more, to 8 bits a channel",
                              partial(Tasks, "smollm2-135m-instruct", 8)),
        "gemma3-270m": Entry("decoder, 4- to 6-bit weights (Q4_K_M, dequantised)", partial(Tasks, "gemma3-270m")),
        "minilm-l6": Entry("encoder, MRPC", Sentences, centered=True, attention=True),
    }
    for name, load in small_networks.openers().items():
        kind = small_networks.SMALL[name]
        found[name] = Entry(kind.what, load, trained_here=True, centered=not kind.gated, attention=kind.attention,
                            mixer=kind.mixer)
    return found


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a network and setting that its bisection asks for: here network by network, so that each is opened once; where
    several run at once, a step of all of them."""
    found, data = entries(), {}

    def measure(asked: list[tuple[str, dict | None]]) -> list[dict[str, Any]]:
        wanted = [{"network": name, "point": point, "margin": MARGIN, "limit": LIMIT} for name, point in asked]
        return checkpoint.items([(params, partial(_score, params)) for params in wanted])

    for names in [[name] for name in found] if sweep.place() == 1 else [list(found)]:
        data |= _rows({name: found[name] for name in names}, measure)
        print("\n".join(f"{name} {data[name]['chosen']}" for name in names), flush=True)
    return data, {"ladder": LADDER, "margin": MARGIN, "group": GROUP, "limit": LIMIT}, [0]


Measure = Callable[[list[tuple[str, dict | None]]], list[dict[str, Any]]]


def _rows(wanted: Mapping[str, Entry], measure: Measure) -> dict[str, Any]:
    """Rows by name; `measure` scores a setting (None: dense) of each network whose search goes on."""
    dense = dict(zip(wanted, measure([(name, None) for name in wanted]), strict=True))
    searches = {name: search(entry.points()) for name, entry in wanted.items()}
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    asked, ended = {name: next(one) for name, one in searches.items()}, {}
    while asked:
        for (name, point), found in zip(list(asked.items()), measure(list(asked.items())), strict=True):
            scores[name].append({"point": point, **found})
            try:
                asked[name] = searches[name].send(within(found, dense[name]))
            except StopIteration as end:
                ended[name] = end.value
                del asked[name]
    rows = {}
    for name, entry in wanted.items():
        tried = [next(score for score in scores[name] if score["point"] == point) for point in ended[name].tried]
        rows[name] = {"what": entry.what, "trained_here": entry.trained_here, "dense": dense[name], "tried": tried,
                      "chosen": ended[name].chosen}
    return rows


def cover(name: str, limit: int = LIMIT) -> dict[str, Any]:
    """The row of any decoder: an embedded name, a hub id or a folder, on `limit` documents of each of the seven tasks.

    Settings are those of its kind: two projections of a mixer, centred on the mode where the FFN has no gate.
    """
    network = Tasks(name, limit=limit, one_copy=True)
    kinds = {*find_sites(network.model).kinds()}
    entry = Entry("decoder, your own", lambda: network, centered=not kinds & {GATE, IN_PROJ_IN}, mixer=IN_PROJ_IN in kinds)
    return _rows({name: entry}, lambda asked: [_scored(network, point) for _, point in asked])[name]


@kept_open
def _opened(name: str) -> Network:
    return entries()[name].load()


def _score(params: dict) -> dict[str, Any]:
    return _scored(_opened(params["network"]), params["point"])


def _scored(network: Network, point: dict | None) -> dict[str, Any]:
    plan = None if point is None else network.fit([scap_common.recipe_of(point)])[0]
    return {**network.score(plan).to_json(), "scale": network.scale}


@dataclass(frozen=True)
class Found:
    """chosen: the sparsest point that passed, or None; tried: the points asked for, from mild to strong."""

    chosen: dict[str, Any] | None
    tried: list[dict[str, Any]]


def search(points: Sequence[dict[str, Any]]) -> Generator[dict[str, Any], bool, Found]:
    """The last of `points` (mild to strong) that passes, by bisection: each is taken to pass if a stronger one does.

    Yields the point to be tried, is sent whether it passes, and returns what was found.
    """
    low, high, tried = -1, len(points), []
    while high - low > 1:
        middle = (low + high) // 2
        tried.append(middle)
        low, high = (middle, high) if (yield points[middle]) else (low, middle)
    return Found(None if low < 0 else points[low], [points[i] for i in sorted(tried)])


def within(found: Mapping[str, Any], dense: Mapping[str, Any], margin: float = MARGIN) -> bool:
    """Whether the relative change on the even units is no worse than -margin."""
    return relative_change(found, dense, slice(0, None, 2)).value >= -margin


def relative_change(found: Mapping[str, Any], dense: Mapping[str, Any], units: slice = slice(1, None, 2)) -> Interval:
    """Score over the dense one's, less one, on some units (the odd ones), paired over them.

    A score is the share of what is right; where `right` holds log-likelihoods (scale "log"), it is the geometric mean
    of the probability given to each right token, one over the perplexity.
    """
    own, base, weights = (np.asarray(a, dtype=float)[units] for a in (found["right"], dense["right"], dense["weights"]))
    if found["scale"] == "log":
        return ratio_interval(own - base, weights, transform=np.expm1)
    drawn = resample(len(own))
    changes = own[drawn].sum(1) / np.maximum(base[drawn].sum(1), 1e-12) - 1
    low, high = np.quantile(changes, [0.025, 0.975])
    return Interval(float(own.sum() / base.sum() - 1), float(low), float(high))
