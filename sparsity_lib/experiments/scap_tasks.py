"""The seven zero-shot tasks of SCAP's tables 5 and 6 at points of its grid beside CATS, with the sparsity met while they run."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.accounting import recorded, summarise
from sparsity_lib.evaluate.benchmarks import BenchmarkResult, run_benchmarks
from sparsity_lib.experiments import common, scap_common
from sparsity_lib.fit import fit
from sparsity_lib.install import installed

GROUP = "scap7"
#: Pairs of SCAP and CATS that skip the same share of the FFN: 33, 47 and 60%; and one lighter and one between.
POINTS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"method": "cats", "gate": 0.5}, {"method": "cats", "gate": 0.7}, {"method": "cats", "gate": 0.9},
    {"method": "scap", "up": 0.2, "down": 0.6}, {"method": "scap", "up": 0.4, "down": 0.6},
    {"method": "scap", "up": 0.5, "down": 0.8}, {"method": "scap", "up": 0.2, "down": 0.4},
)
#: Documents a task.
LIMIT = 100
DTYPE = "bfloat16"


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and point; None is the dense model."""
    wanted = [{"model": name, "point": point, "group": GROUP, "limit": LIMIT, "dtype": DTYPE, "calibration": common.CALIBRATION}
              for name in common.MODELS for point in POINTS]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_score, params)) for params in wanted]), strict=True):
        data.setdefault(params["model"], []).append({"point": params["point"], **found})
        result = BenchmarkResult.from_dict(found["result"])
        print(f"{params['model']} {params['point']} {result.score(GROUP).mean:.3f} in {result.seconds:.0f} s", flush=True)
    return data, {"points": POINTS, "group": GROUP, "limit": LIMIT, "dtype": DTYPE, "calibration": common.CALIBRATION}, [0]


def _score(params: dict) -> dict:
    opened = common.opened(params["model"], params["dtype"])
    model, tokenizer, point = opened.model, opened.tokenizer, params["point"]
    if point is None:
        return {"result": run_benchmarks(model, tokenizer, params["group"], limit=params["limit"]).to_dict(), "shares": None}
    plan = fit(scap_common.recipe_of(point), opened.fitted, tokenizer, **params["calibration"])
    with installed(model, plan), recorded(model) as counted:
        result = run_benchmarks(model, tokenizer, params["group"], limit=params["limit"])
        return {"result": result.to_dict(), "shares": scap_common.shares(summarise(model, counted()))}
