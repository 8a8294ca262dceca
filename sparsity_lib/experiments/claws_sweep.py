"""Density sweep: perplexity and KL of every gate-side score, LaRoSA at an equal share of weights skipped, bound and floor."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsity_lib.accounting import account
from sparsity_lib.assets.models import load_model
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common
from sparsity_lib.install import installed
from sparsity_lib.plan import Plan
from sparsity_lib.sweep import kept_open

METHODS = (
    "cats", "gate_topk", "claws", "claws_fisher_skip_first", "claws_mean", "claws_median", "claws_sqrt",
    "larosa", "inputs_topk", "oracle", "random",
)
#: 32 sequences of 256 tokens; for Gemma's head of 262,144 tokens every 4th token is predicted.
TEXT = {"sequences": 32, "length": 256}
EVERY = {"smollm2-135m-instruct": 1, "gemma3-270m": 4}
DTYPE = "bfloat16"


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and method: its quality and weights skipped at all densities."""
    wanted = [{"model": name, "method": method, "densities": common.DENSITIES, "text": TEXT, "every": EVERY[name],
               "dtype": DTYPE, "calibration": common.CALIBRATION} for name in common.MODELS for method in METHODS]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_sweep, params)) for params in wanted]), strict=True):
        data.setdefault(params["model"], {})[params["method"]] = found
    return data, {"methods": METHODS, "densities": common.DENSITIES, "text": TEXT, "every": EVERY, "dtype": DTYPE,
                  "calibration": common.CALIBRATION}, [0]


@kept_open
def _opened(name: str, dtype: str, densities: tuple, text: dict) -> tuple[nn.Module, dict[tuple[str, float], Plan], Tensor]:
    """The model to run, the plans of every method, which are fitted together, and the text."""
    fitted, tokenizer = load_model(name)  # calibrated in float32, run in the dtype of the table
    plans = common.fit_methods(fitted, tokenizer, METHODS, densities)
    model, _ = load_model(name, dtype=common.dtype_named(dtype))
    return model, plans, common.evaluation_ids(tokenizer, **text)


def _sweep(params: dict) -> dict:
    model, fitted, ids = _opened(*(params[key] for key in ("model", "dtype", "densities", "text")))
    plans = {density: fitted[params["method"], density] for density in params["densities"]}
    found = evaluate(model, {str(d): plan for d, plan in plans.items()}, ids, every=params["every"])
    shares = {}
    for density, plan in plans.items():
        with installed(model, plan):
            counted = account(model, ids=ids[:4])
        shares[str(density)] = {
            "skipped": counted.skipped, "low": counted.skipped_low, "high": counted.skipped_high,
            "ffn": counted.paper_counts["ffn"], "sites": counted.site_sparsity,
            "transform_weights": counted.transform_weights, "dense_weights": counted.dense_weights,
        }
    return {"quality": {d: q.to_json() for d, q in found.items()}, "shares": shares, "ids": common.fingerprint(ids)}
