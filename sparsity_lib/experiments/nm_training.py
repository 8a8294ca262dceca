"""Why learned repairs help one model and harm another: errors in other units, and scales and offsets each alone."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common
from sparsity_lib.experiments.nm_common import DTYPE, REPAIRS, Bench, point, recipe_of
from sparsity_lib.experiments.scap_grid import EVERY, TEXT
from sparsity_lib.fit import fit
from sparsity_lib.plan import Plan
from sparsity_lib.train.repairs import RepairRecipe, TrainedRepairs, train_repairs

POINT = point("8:16", repair=["ls"])
#: The model that LS harms.
MODEL = "gemma3-270m"
#: Name -> changes to `REPAIRS`. The first takes as many steps as the study at its rate, on sequences half as long.
WAYS: dict[str, dict[str, Any]] = {
    "the study's rate and steps": {"sequences": 256, "learning_rate": 1e-4},
    "error by channel": {"error": "by channel"},
    "error by token": {"error": "by token"},
}
#: What is kept of trained tensors, beside -> the value that others get.
HALVES = {"scale": ("offset", 0.0), "offset": ("scale", 1.0)}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a way, and one for the halves of what `REPAIRS` gives; the whole of that is in nm_quality."""
    shared = {"model": MODEL, "point": POINT, "text": TEXT, "every": EVERY[MODEL], "dtype": DTYPE,
              "calibration": common.CALIBRATION}
    wanted = [({"way": way, "repairs": {**REPAIRS, **changes}, **shared}, measure) for way, changes in WAYS.items()]
    wanted.append(({"halves": sorted(HALVES), "repairs": REPAIRS, **shared}, measure_halves))
    found = checkpoint.items([(params, partial(compute, params)) for params, compute in wanted])
    return {"ways": dict(zip(WAYS, found, strict=False)), "halves": found[-1]}, {**shared, "ways": WAYS, "repairs": REPAIRS}, [0]


def trained(params: dict[str, Any]) -> tuple[Bench, TrainedRepairs]:
    """The models, and the point's plan with its repairs trained."""
    bench = Bench(params["model"], params["text"])
    plan = fit(recipe_of(params["point"]), bench.fitted, bench.tokenizer, **params["calibration"])
    return bench, train_repairs(bench.fitted, plan, bench.tokenizer, recipe=RepairRecipe(**params["repairs"]))


def measure(params: dict[str, Any]) -> dict[str, Any]:
    """Quality with repairs trained one way, and each block's error before and after, in that way's units."""
    bench, made = trained(params)
    found = evaluate(bench.model, {"repaired": made.plan}, bench.ids, every=params["every"])
    return {"quality": found["repaired"].to_json(), "before": made.before, "after": made.after,
            "ids": common.fingerprint(bench.ids)}


def measure_halves(params: dict[str, Any]) -> dict[str, Any]:
    """Quality with the trained scales alone, and with the trained offsets alone."""
    bench, made = trained(params)
    plans = {half: half_of(made.plan, half) for half in params["halves"]}
    found = evaluate(bench.model, plans, bench.ids, every=params["every"])
    return {half: {"quality": found[half].to_json()} for half in plans}


def half_of(plan: Plan, half: str) -> Plan:
    """The plan with its scales or its offsets as trained, and the others as they were before."""
    other, value = HALVES[half]
    tensors = {name: torch.full_like(tensor, value) if name.split(".")[-1].startswith(f"{other}_") else tensor
               for name, tensor in plan.tensors.items()}
    return dataclasses.replace(plan, tensors=tensors)
