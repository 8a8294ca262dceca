"""N:M pruning on both models: patterns by scores, repairs alone and in pairs, weights beside activations, site by site."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common
from sparsity_lib.experiments.nm_common import DTYPE, PATTERNS, REPAIRS, UNSTRUCTURED, Bench, Point, bench_for, learned, point
from sparsity_lib.experiments.scap_grid import EVERY, TEXT

SCORES = ("act", "clact", "amber", "wina", "gradient")
WEIGHTS = ("magnitude", "wanda")
#: Where repairs are tried, and each of them as options of a point.
REPAIRED = ("2:4", "8:16")
SINGLE = ({"transform": "spts"}, {"transform": "dpts"}, {"repair": ["var"]}, {"repair": ["low_rank"]})
TRAINED = ({"transform": "lpts"}, {"repair": ["ls"]})
#: Pairs at 8:16.
PAIRS = (
    {"transform": "spts", "repair": ["var"]}, {"transform": "dpts", "repair": ["var"]}, {"repair": ["var", "low_rank"]},
    {"score": "clact", "repair": ["var"]}, {"score": "amber", "repair": ["var"]}, {"score": "wina", "repair": ["var"]},
    {"score": "wina", "transform": "dpts"},
)
TRAINED_PAIRS = ({"transform": "lpts", "repair": ["ls"]}, {"repair": ["var", "ls"]}, {"score": "wina", "repair": ["ls"]})
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
SITES = ("qkv_in", "o_in", "up_in", "down_in")
CHOSEN = "8:16"


def groups() -> dict[str, list[dict[str, Any]]]:
    """Name -> the points that are fitted and measured together."""
    found = {f"score {score}": [point(p, score=score) for p in (*PATTERNS, UNSTRUCTURED)] for score in SCORES}
    for pattern in REPAIRED:
        found[f"repairs {pattern}"] = [point(pattern, **options) for options in SINGLE]
        for options in TRAINED:
            found[f"learned {pattern} {'+'.join(_words(options))}"] = [point(pattern, **options)]
    found["pairs"] = [point(CHOSEN, **options) for options in PAIRS]
    for options in TRAINED_PAIRS:
        found[f"learned pair {'+'.join(_words(options))}"] = [point(CHOSEN, **options)]
    for score in WEIGHTS:
        found[f"weights {score}"] = [point(p, on="weights", score=score) for p in (*PATTERNS, UNSTRUCTURED)]
    found["alone"] = [point(CHOSEN, sites=[projection]) for projection in PROJECTIONS]
    found["left dense"] = [point(CHOSEN, dense=[site]) for site in SITES]
    found["sparser"] = [point("30%"), point("30%", on="weights", score="wanda")]
    return found


def _words(options: dict[str, Any]) -> list[str]:
    return [options[key] for key in ("score", "transform") if key in options] + list(options.get("repair", ()))


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and group."""
    wanted = [(group, {"model": name, "points": points, "text": TEXT, "every": EVERY[name], "dtype": DTYPE,
                       "calibration": common.CALIBRATION, **({"repairs": REPAIRS} if any(map(learned, points)) else {})})
              for name in common.MODELS for group, points in groups().items()]
    items = checkpoint.items([(params, partial(_measure, params)) for _, params in wanted])
    data: dict[str, Any] = {}
    for (group, params), found in zip(wanted, items, strict=True):
        own = data.setdefault(params["model"], {"groups": {}, "dense": found["dense"], "ids": found["ids"]})
        own["groups"][group] = found["points"]
    return data, {"text": TEXT, "every": EVERY, "dtype": DTYPE, "calibration": common.CALIBRATION, "repairs": REPAIRS,
                  "chosen": CHOSEN}, [0]


def _measure(params: dict) -> dict:
    bench, points = bench_for(params["model"], params["text"]), params["points"]
    changes = bench.changes(points)
    found = evaluate(bench.model, {str(i): change for i, change in enumerate(changes)}, bench.ids, every=params["every"])
    return {
        "points": [_point(bench, i, p, changes[i], found[str(i)]) for i, p in enumerate(points)],
        "dense": found["dense"].to_json(), "ids": common.fingerprint(bench.ids),
    }


def _point(bench: Bench, place: int, point: Point, change, quality) -> dict[str, Any]:
    return {**point, "quality": quality.to_json(), "shares": bench.shares(point, change), **bench.more.pop(place, {})}
