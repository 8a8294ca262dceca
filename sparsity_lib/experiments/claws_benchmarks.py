"""Avg5 and MMLU at 50% FFN density: dense, CATS, CLAWS and LaRoSA on both models."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from sparsity_lib.assets.models import load_model
from sparsity_lib.evaluate.benchmarks import BenchmarkResult, run_benchmarks
from sparsity_lib.experiments import common
from sparsity_lib.install import installed

METHODS = ("dense", "cats", "claws", "larosa")
DENSITY = 0.5
#: Documents a task (all where a set has fewer), and a subject of MMLU.
LIMITS = {"avg5": 500, "mmlu": 10}
DTYPE = "bfloat16"


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, method and group."""
    data: dict[str, Any] = {}
    for name in common.MODELS:
        loaded: dict[str, Any] = {}
        for method in METHODS:
            for group, limit in LIMITS.items():
                params = {"model": name, "method": method, "density": DENSITY, "group": group, "limit": limit,
                          "dtype": DTYPE, "calibration": common.CALIBRATION}
                found = checkpoint.item(params, partial(_score, loaded, params))
                data.setdefault(name, {}).setdefault(method, {})[group] = found
                result = BenchmarkResult.from_dict(found)
                print(f"{name} {method} {group} {result.score(group).mean:.3f} in {result.seconds:.0f} s", flush=True)
    return data, {"methods": METHODS, "density": DENSITY, "limits": LIMITS, "dtype": DTYPE,
                  "calibration": common.CALIBRATION}, [0]


def _score(loaded: dict, params: dict) -> dict:
    if not loaded:
        loaded["fit"], loaded["tokenizer"] = load_model(params["model"])
        loaded["run"], _ = load_model(params["model"], dtype=common.dtype_named(params["dtype"]))
        loaded["plans"] = {}
    method, plans = params["method"], loaded["plans"]
    if method != "dense" and method not in plans:  # calibrated in float32, run in the dtype of the table
        fitted = common.fit_methods(loaded["fit"], loaded["tokenizer"], [method], [params["density"]])
        plans[method] = fitted[method, params["density"]]
    with installed(loaded["run"], plans.get(method)):
        return score(loaded["run"], loaded["tokenizer"], params["group"], params["limit"])


def score(model: nn.Module, tokenizer, group: str, limit: int) -> dict:
    """Zero-shot scores of a group as plain data."""
    return run_benchmarks(model, tokenizer, group, limit=limit, seed=0).to_dict()
