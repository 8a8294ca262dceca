"""Nine benchmarks at equal shares of all weights skipped, for every method and for what the search chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sparsity_lib.evaluate.benchmarks import run_benchmarks
from sparsity_lib.experiments import common, compare_granular
from sparsity_lib.experiments.compare_common import DTYPE, Bench, Point, bench_for
from sparsity_lib.experiments.compare_search import COSTS, HEAD_EVERY, ablations, candidate_points, current
from sparsity_lib.experiments.scap_grid import TEXT

#: The seven of SCAP's tables, OpenBookQA and MMLU; documents a task, and a subject of MMLU.
TASKS = {"scap7": 60, "openbookqa": 60, "mmlu": 1}
METHODS = ("cats", "claws", "gaussian", "griffin", "oracle", "random", "scap", "teal", "inputs_topk", "larosa", "wina", "rsparse",
           "nm", "magnitude", "wanda", "teal_head", "wina_head", "larosa_head", "spread")
#: By model: what a method without the head can reach, and what only those with it do.
SHARES = {"smollm2-135m-instruct": (0.2, 0.4), "gemma3-270m": (0.15, 0.4)}
#: Tasks score words that a model finds unlikely, so what is done at the head is tried apart: without parts of the candidate.
WITHOUT = ("without refined words", "without the head")


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, method and share; first the dense model's. The search has to be kept before."""
    candidate = current()
    wanted: list[tuple[dict[str, Any], dict[str, str]]] = []  # an item's parameters, and what is said of it besides
    for name in common.MODELS:
        trained = [(compare_granular.METHOD, share) for share in compare_granular.shares_of(name)]
        for method, share in [("dense", 0.0), *((m, s) for m in METHODS for s in SHARES[name]), *trained]:
            searched = {"costs": COSTS, "head_every": HEAD_EVERY[name], "candidate": candidate} if method == "spread" else {}
            wanted.append(({"model": name, "method": method, "share": share, "tasks": TASKS, "dtype": DTYPE,
                            "calibration": common.CALIBRATION, **searched}, {}))
        wanted += _without(name, candidate)
    items = checkpoint.items([(params, partial(score, params)) for params, _ in wanted])
    data: dict[str, Any] = {}
    for (params, more), found in zip(wanted, items, strict=True):
        data.setdefault(params["model"], []).append({"method": params["method"], **more, "share": params["share"], **found})
    return data, {"tasks": TASKS, "methods": METHODS, "shares": SHARES, "dtype": DTYPE, "costs": COSTS,
                  "candidate": candidate, "calibration": common.CALIBRATION}, [0]


def _without(name: str, candidate: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """The candidate without some of its parts, at the larger share."""
    others = ablations(candidate)
    return [({"model": name, "method": "spread", "share": SHARES[name][-1], "tasks": TASKS, "dtype": DTYPE, "costs": COSTS,
              "calibration": common.CALIBRATION, "head_every": HEAD_EVERY[name], "candidate": others[part]}, {"part": part})
            for part in WITHOUT if part in others]


def point_of(bench: Bench, params: Mapping[str, Any], share: float, shares: Sequence[float]) -> Point:
    """An item's method, or the search's candidate, at a share; fitted once for all `shares`, whose items follow each other."""
    method, candidate = params["method"], params.get("candidate")

    def points() -> list[Point]:
        if candidate is None:
            return bench.points(method, shares, calibration=params["calibration"])
        return candidate_points(bench, candidate, shares, params["costs"], params["head_every"], params["calibration"])

    return bench.once([method, candidate, shares, params["calibration"]], points)[list(shares).index(share)]


def score(params: dict) -> dict[str, Any]:
    """One item: outcomes by task, and the share skipped; or the reason why a method cannot skip as much."""
    bench = bench_for(params["model"], TEXT)

    def results() -> dict[str, Any]:
        return {task: run_benchmarks(bench.model, bench.tokenizer, task, limit=limit).to_dict()
                for task, limit in params["tasks"].items()}

    if params["method"] == compare_granular.METHOD:
        return compare_granular.tasks(bench, params)
    if params["method"] == "dense":
        return {"results": results()}
    point = point_of(bench, params, params["share"], SHARES[params["model"]])
    if point.change is None:
        return point.about
    shares = bench.shares(point)
    with bench.within(point):
        return {"results": results(), "skipped": shares["skipped"]}
