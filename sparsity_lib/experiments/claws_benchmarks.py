"""Avg5 and MMLU at 50% FFN density: dense, CATS, CLAWS and LaRoSA on both models."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from sparsity_lib.evaluate.benchmarks import BenchmarkResult, run_benchmarks
from sparsity_lib.experiments import common
from sparsity_lib.install import installed
from sparsity_lib.plan import Plan

METHODS = ("dense", "cats", "claws", "larosa")
DENSITY = 0.5
#: Documents a task (all where a set has fewer), and a subject of MMLU.
LIMITS = {"avg5": 500, "mmlu": 10}
DTYPE = "bfloat16"


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, method and group."""
    wanted = [{"model": name, "method": method, "density": DENSITY, "group": group, "limit": limit, "dtype": DTYPE,
               "calibration": common.CALIBRATION}
              for name in common.MODELS for method in METHODS for group, limit in LIMITS.items()]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_score, params)) for params in wanted]), strict=True):
        name, method, group = (params[key] for key in ("model", "method", "group"))
        data.setdefault(name, {}).setdefault(method, {})[group] = found
        result = BenchmarkResult.from_dict(found)
        print(f"{name} {method} {group} {result.score(group).mean:.3f} in {result.seconds:.0f} s", flush=True)
    return data, {"methods": METHODS, "density": DENSITY, "limits": LIMITS, "dtype": DTYPE,
                  "calibration": common.CALIBRATION}, [0]


def _score(params: dict) -> dict:
    opened = common.opened(params["model"], params["dtype"])
    method, density = params["method"], params["density"]

    def plan() -> Plan | None:
        if method == "dense":
            return None
        return common.fit_methods(opened.fitted, opened.tokenizer, [method], [density])[method, density]

    with installed(opened.model, opened.once([method, density], plan)):
        return score(opened.model, opened.tokenizer, params["group"], params["limit"])


def score(model: nn.Module, tokenizer, group: str, limit: int) -> dict:
    """Zero-shot scores of a group as plain data."""
    return run_benchmarks(model, tokenizer, group, limit=limit, seed=0).to_dict()
