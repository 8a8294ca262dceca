"""The papers' tasks on SmolLM2: dense, by thresholds that were learned, and by TEAL at the same ratios."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.accounting import account
from sparsity_lib.assets.models import load_model
from sparsity_lib.cwic import measure
from sparsity_lib.cwic.shipped import load_shipped
from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.evaluate.benchmarks import run_benchmarks
from sparsity_lib.experiments import common
from sparsity_lib.experiments.cwic_small import density_at
from sparsity_lib.experiments.cwic_smol import CALIBRATION, MODEL
from sparsity_lib.fit import fit
from sparsity_lib.install import installed
from sparsity_lib.methods.teal import teal

GROUP = "cwic6"
POINTS = ("dense", "smollm2-cwic-2x", "smollm2-cwic-3x", "teal 2x", "teal 3x")
LIMIT = 100
DTYPE = "bfloat16"
#: Text on which ratios are counted.
COUNTED = {"sequences": 4, "length": 256}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a point."""
    shared = {"model": MODEL, "group": GROUP, "limit": LIMIT, "dtype": DTYPE, "calibration": CALIBRATION, "counted": COUNTED}
    wanted = [{"point": point, **shared} for point in POINTS]
    found = checkpoint.items([(params, partial(score, params)) for params in wanted])
    return dict(zip(POINTS, found, strict=True)), {**shared, "points": POINTS}, [0]


def score(params: dict) -> dict[str, Any]:
    """The tasks' outcomes and the ratio of one point."""
    point, dtype = params["point"], common.dtype_named(params["dtype"])
    model, tokenizer = load_model(params["model"], dtype=dtype)
    ids = common.evaluation_ids(tokenizer, **params["counted"])
    options = {"tasks": params["group"], "limit": params["limit"]}
    if point == "dense":
        return _found(run_benchmarks(model, tokenizer, **options), 1.0)
    if point.startswith("teal"):
        fitted, _ = load_model(params["model"])
        ratio = float(point.removeprefix("teal ").removesuffix("x"))
        plan = fit(teal(density_at(ratio, fitted)), fitted, tokenizer, **params["calibration"])
        with installed(model, plan):
            return _found(run_benchmarks(model, tokenizer, **options), 1 / (1 - account(model, ids=ids).skipped))
    granular, tokenizer = load_shipped(point, dtype)
    return _found(run_benchmarks(granular, tokenizer, **options), measure(granular, ids).ratio())


def _found(result: BenchmarkResult, ratio: float) -> dict[str, Any]:
    return {"result": result.to_dict(), "ratio": ratio}
