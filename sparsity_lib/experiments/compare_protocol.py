"""How much of a published gap is protocol: the share of tokens made sparse, and the calibration text, its length and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sparsity_lib.assets.texts import sources
from sparsity_lib.experiments import common
from sparsity_lib.experiments.compare_common import DTYPE, Point, bench_for
from sparsity_lib.experiments.compare_quality import measured
from sparsity_lib.experiments.scap_grid import EVERY

#: Half of the comparison's text: many settings of few methods.
TEXT = {"sequences": 8, "length": 256}
METHODS = ("cats", "claws", "teal", "larosa", "wina")
#: Shares of all weights, of a token that is made sparse: what every method above can reach.
SHARE = {"smollm2-135m-instruct": 0.2, "gemma3-270m": 0.1}
#: As published: all tokens, WINA's 99%, TEAL's and GRIFFIN's half, R-Sparse's tenth.
TOKEN_SHARES = (1.0, 0.99, 0.5, 0.1)
LENGTHS = ({"tokens": 8192}, {"tokens": 2048}, {"tokens": 512}, {"tokens": 8192, "length": 64})
SEEDS = (0, 1, 2)


def settings() -> dict[str, list[dict[str, Any]]]:
    """Effect -> what is changed, one thing at a time; each first as in the rest of the book."""
    return {
        "tokens": [{"token_share": share} for share in TOKEN_SHARES],
        "text": [{"calibration": {}}, *({"calibration": {"source": source}} for source in sources("calibration"))],
        "length": [{"calibration": length} for length in LENGTHS],
        "seed": [{"calibration": {"seed": seed}} for seed in SEEDS],
    }


def usual(change: Mapping[str, Any]) -> bool:
    """Whether a change is none: all tokens, and the book's calibration text."""
    return change.get("token_share", 1.0) == 1 and {**common.CALIBRATION, **change.get("calibration", {})} == common.CALIBRATION


def effects(method: str) -> dict[str, list[dict[str, Any]]]:
    """The settings of a method: all, but for GRIFFIN only the shares of tokens that leave it a prompt."""
    if method != "griffin":
        return settings()
    return {"tokens": [each for each in settings()["tokens"] if each["token_share"] < 0.9]}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, method and effect.

    The usual protocol, with which every effect begins, is measured with the first of them only.
    """
    wanted = []
    for name in common.MODELS:
        for method in (*METHODS, "griffin"):
            for effect, changes in effects(method).items():
                own = [change for change in changes if effect == next(iter(settings())) or not usual(change)]
                wanted.append({"model": name, "method": method, "share": SHARE[name], "effect": effect, "changes": own,
                               "text": TEXT, "every": EVERY[name], "dtype": DTYPE, "calibration": common.CALIBRATION})
    items = checkpoint.items([(params, partial(measure, params)) for params in wanted])
    data: dict[str, Any] = {}
    for params, found in zip(wanted, items, strict=True):
        known = data.setdefault(params["model"], {}).setdefault(params["method"], {})
        changes = effects(params["method"])[params["effect"]]
        if len(params["changes"]) < len(changes):
            found = [{**next(iter(known.values()))[0], "change": changes[0]}, *found]
        known[params["effect"]] = found
    return data, {"methods": METHODS, "share": SHARE, "settings": settings(), "text": TEXT, "every": EVERY, "dtype": DTYPE,
                  "calibration": common.CALIBRATION}, list(SEEDS)


def measure(params: dict) -> list[dict[str, Any]]:
    """One method with one thing changed at a time, at the same density throughout."""
    bench = bench_for(params["model"], params["text"])
    points: list[Point] = []
    for change in params["changes"]:
        if "token_share" in change and points:  # nothing that is fitted depends on it
            points.append(with_token_share(points[0], change["token_share"]))
            continue
        share = params["share"] * change.get("token_share", 1.0)  # counted over all tokens: the density stays
        points += bench.points(params["method"], (share,), **change)
    found = measured(bench, points, params["every"])
    rows = zip(params["changes"], found["points"], strict=True)
    return [{"change": change, "dense": found["dense"], **row} for change, row in rows]


def with_token_share(point: Point, token_share: float) -> Point:
    """The same plan for another share of each sequence's tokens."""
    recipe = replace(point.change.recipe, token_share=token_share)
    return Point(point.share * token_share / point.change.recipe.token_share, replace(point.change, recipe=recipe),
                 {"recipe": recipe.to_json()})
