"""How stable CLAWS' saliency is over calibration size, text source and seed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sparsity_lib.analysis import spearman
from sparsity_lib.assets.texts import sources
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common
from sparsity_lib.fit import fit_many
from sparsity_lib.methods import claws
from sparsity_lib.plan import Plan

MODEL = "smollm2-135m-instruct"
VARIANTS = ("fisher", "mean", "median")
SIZES = (1024, 2048, 4096, 16384, 65536)
SEEDS = (0, 1, 2)
DENSITY = 0.3
TEXT = {"sequences": 8, "length": 256}
LENGTH = 512


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a calibration set; correlations with the largest one are taken at the end."""
    sets = [{"tokens": size, "source": None, "seed": 0} for size in SIZES]
    sets += [{"tokens": 4096, "source": None, "seed": seed} for seed in SEEDS[1:]]
    sets += [{"tokens": 4096, "source": source, "seed": 0} for source in sources("calibration")]
    wanted = [{"model": MODEL, "variants": VARIANTS, "density": DENSITY, "text": TEXT, "length": LENGTH, **calibration}
              for calibration in sets]
    items = checkpoint.items([(params, partial(_measure, params)) for params in wanted])
    found = [{**calibration, **item} for calibration, item in zip(sets, items, strict=True)]
    for calibration, item in zip(sets, found, strict=True):
        print(calibration, {v: round(item["kl"][v][0], 4) for v in VARIANTS}, flush=True)
    reference = next(f for f in found if f["tokens"] == SIZES[-1])["saliency"]
    for item in found:
        own = item.pop("saliency") if item["tokens"] != SIZES[-1] else item["saliency"]
        item["spearman"] = {v: float(spearman(torch.tensor(own[v]), torch.tensor(reference[v])).mean()) for v in VARIANTS}
    for item in found:
        item.pop("saliency", None)
    return found, {"model": MODEL, "variants": VARIANTS, "sizes": SIZES, "density": DENSITY, "text": TEXT}, list(SEEDS)


def _measure(params: dict) -> dict:
    model, tokenizer = common.in_float32(params["model"])
    recipes = [claws(params["density"], variant=v) for v in params["variants"]]
    calibration = {name: params[name] for name in ("tokens", "source", "seed", "length")}
    plans = dict(zip(params["variants"], fit_many(recipes, model, tokenizer, **calibration), strict=True))
    quality = evaluate(model, plans, common.evaluation_ids(tokenizer, **params["text"]))
    return {
        "kl": {v: quality[v].divergence().to_json() for v in plans},
        "saliency": {v: _stacked(plan) for v, plan in plans.items()},
    }


def _stacked(plan: Plan) -> list[list[float]]:
    """The saliency of every layer, [layers, width], rounded to what a rank needs."""
    layers = range(len(plan.widths))
    return [[float(f"{c:.4g}") for c in plan.tensors[f"{i}.gate.saliency"].tolist()] for i in layers]
