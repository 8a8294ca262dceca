"""Every method at equal share of all weights skipped, on both models: KL, loss, agreement, and what each method adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common, compare_granular
from sparsity_lib.experiments.compare_common import DTYPE, EVERY_METHOD, SEARCH, Bench, Point, bench_for
from sparsity_lib.experiments.scap_grid import EVERY, TEXT

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and method: quality and counts at every share that it can reach, the reason where it cannot."""
    data: dict[str, Any] = {}
    wanted: list[tuple[dict[str, Any], Callable[[dict], dict]]] = []
    for name in common.MODELS:
        shared = {"model": name, "text": TEXT, "every": EVERY[name], "dtype": DTYPE}
        wanted += [({**shared, "method": method, "shares": SHARES, "calibration": common.CALIBRATION,
                     **({"search": SEARCH} if method == "teal_greedy" else {})}, measure) for method in EVERY_METHOD]
        if trained := compare_granular.shares_of(name):
            wanted.append(({**shared, "method": compare_granular.METHOD, "shares": trained}, granular))
    items = checkpoint.items([(params, partial(compute, params)) for params, compute in wanted])
    for (params, compute), found in zip(wanted, items, strict=True):
        own = data.setdefault(params["model"], {"methods": {}})
        own["methods"][params["method"]] = found["points"]
        if compute is measure:
            own.update(dense=found["dense"], ids=found["ids"])
    return data, {"methods": EVERY_METHOD, "shares": SHARES, "text": TEXT, "every": EVERY, "dtype": DTYPE, "search": SEARCH,
                  "calibration": common.CALIBRATION}, [0]


def measure(params: dict) -> dict[str, Any]:
    """One method at all shares."""
    bench = bench_for(params["model"], params["text"])
    return measured(bench, bench.points(params["method"], params["shares"], calibration=params["calibration"]), params["every"])


def granular(params: dict) -> dict[str, Any]:
    """CWIC's thresholds, where they were trained."""
    return compare_granular.quality(bench_for(params["model"], params["text"]), params["shares"], params["every"])


def measured(
    bench: Bench, points: Sequence[Point], every: int, shares: Callable[[Point], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Quality and shares of points, in plain data; shares are counted on text unless a function gives them."""
    shares = shares or bench.shares
    possible = {str(i): point.change for i, point in enumerate(points) if point.change is not None}
    found = evaluate(bench.model, possible, bench.ids, every=every)
    rows = []
    for i, point in enumerate(points):
        row = {"share": point.share, **point.about}
        if point.change is not None:
            row |= {"quality": found[str(i)].to_json(), "shares": shares(point)}
        rows.append(row)
    return {"points": rows, "dense": found["dense"].to_json(), "ids": common.fingerprint(bench.ids)}
