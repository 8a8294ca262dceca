"""Target against actual sparsity: by layer, on every task and text, with thresholds fitted at once or layer after layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from sparsity_lib.accounting import recorded, token_densities
from sparsity_lib.assets.texts import sources, token_sequences
from sparsity_lib.evaluate.benchmarks import run_benchmarks
from sparsity_lib.evaluate.groups import resolve
from sparsity_lib.experiments import common, scap_common
from sparsity_lib.fit import fit
from sparsity_lib.install import installed

TARGETS = (0.2, 0.4, 0.6, 0.8)
TASKS = resolve("scap7")
#: Documents a task, and tokens of each evaluation source.
LIMIT, TEXT = 16, {"tokens": 2048, "length": 256}
#: Model -> whether thresholds are also fitted layer after layer, on activations that are sparse already.
RUNS = {"smollm2-135m-instruct": (False, True), "gemma3-270m": (False,)}
DTYPE = "bfloat16"


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, target and way of fitting: the mean sparsity by site and layer on each task and text."""
    wanted = [{"model": name, "target": target, "sequential": sequential, "tasks": TASKS, "limit": LIMIT, "text": TEXT,
               "dtype": DTYPE, "calibration": common.CALIBRATION}
              for name, ways in RUNS.items() for sequential in ways for target in TARGETS]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_measure, params)) for params in wanted]), strict=True):
        way = "sequential" if params["sequential"] else "at once"
        data.setdefault(params["model"], {}).setdefault(way, {})[str(params["target"])] = found
    return data, {"targets": TARGETS, "tasks": TASKS, "limit": LIMIT, "text": TEXT, "dtype": DTYPE,
                  "calibration": common.CALIBRATION}, [0]


def _measure(params: dict) -> dict[str, dict[str, list[float]]]:
    opened = common.opened(params["model"], params["dtype"])
    model, tokenizer = opened.model, opened.tokenizer
    recipe = scap_common.recipe_of({"method": "scap", "up": params["target"], "down": params["target"]})
    extra = {"sequential": True} if params["sequential"] else {}
    plan = fit(recipe, opened.fitted, tokenizer, **params["calibration"], **extra)
    found = {}
    with installed(model, plan):
        for task in params["tasks"]:
            with recorded(model) as counted:
                run_benchmarks(model, tokenizer, task, limit=params["limit"])
                found[task] = by_layer(counted())
        for source in sources("evaluation"):
            ids = token_sequences(tokenizer, "evaluation", source=source, **params["text"])
            found[f"text of {source}"] = by_layer(token_densities(model, ids))
    return found


def by_layer(densities: dict[str, Tensor]) -> dict[str, list[float]]:
    """Site kind -> share dropped by layer, from the densities by site and token."""
    found: dict[str, dict[int, float]] = {}
    for name, density in densities.items():
        layer, kind = name.split(".")
        found.setdefault(kind, {})[int(layer)] = 1 - float(density.mean())
    return {kind: [layers[i] for i in sorted(layers)] for kind, layers in found.items()}
