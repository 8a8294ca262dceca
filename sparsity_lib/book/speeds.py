"""Measured decoding speed against weights skipped, for the methods whose execution was measured."""

from __future__ import annotations

from functools import cache

import numpy as np

from sparsity_lib import results
from sparsity_lib.bench.timing import by_length

#: Method -> settings of `bench/decode` that do what it does at run time. A rotation, a correction or a norm costs extra, so that
#: methods with one are not here.
SETTINGS = {"cats": "neurons", "claws": "neurons", "teal": "inputs", "teal_greedy": "inputs", "inputs_topk": "inputs"}
#: How far beyond the last measured setting a speed is still read.
SLACK = 1.02
#: Bytes of a weight in the measured decoders (bfloat16).
BYTES = 2
#: Model -> method or kind of setting -> [(share of all weights skipped, times as fast as dense)], the dense decoder first.
Speeds = dict[str, dict[str, list[tuple[float, float]]]]


@cache
def settings() -> Speeds:
    """Kinds of settings of `bench/decode`, medians over prompts."""
    if not {"bench/decode", "claws_sweep"} <= set(results.names()):
        return {}
    sweep = results.load("claws_sweep").data
    weights = {model: next(iter(found["claws"]["shares"].values()))["dense_weights"] for model, found in sweep.items()}
    found: Speeds = {}
    for model, measured in results.load("bench/decode").data.items():
        for setting, each in measured.items() if model in weights else ():
            kind = setting.split()[0]
            if kind in SETTINGS.values():
                points = list(by_length(each["prompts"]).values())
                saved = points[0]["bytes"]["dense"] - points[0]["bytes"]["sparse"]
                _add(found, model, kind, saved / (BYTES * weights[model]), float(np.median([p["ratio"] for p in points])))
    return found


@cache
def compared() -> Speeds:
    """Methods of `bench/compare`, each with its own mask and its cost."""
    found: Speeds = {}
    if "bench/compare" in results.names():
        for model, rows in results.load("bench/compare").data.items():
            for row in rows:
                if "ratio" in row:
                    _add(found, model, row["method"], row["skipped"], row["ratio"])
    return found


def _add(found: Speeds, model: str, name: str, share: float, ratio: float) -> None:
    points = found.setdefault(model, {}).setdefault(name, [(0.0, 1.0)])
    points.append((share, ratio))
    points.sort()


def points(model: str, method: str) -> list[tuple[float, float]]:
    """The measured points that hold for a method, its own before those of a setting; none where there are neither."""
    own = compared().get(model, {}).get(method)
    return own or settings().get(model, {}).get(SETTINGS.get(method, ""), [])


def speed(model: str, method: str, skipped: float) -> float | None:
    """Times as fast as dense: time lies on a line between measured settings; None beyond them."""
    known = points(model, method)
    if not known or not 0 <= skipped <= known[-1][0] * SLACK:
        return None
    shares, ratios = zip(*known, strict=True)
    return float(1 / np.interp(skipped, shares, [1 / r for r in ratios]))
