"""SCAP's grid over its two target sparsities beside CATS, on both models: KL, perplexity and what is left unread."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.accounting import account
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common, scap_common
from sparsity_lib.fit import fit_many
from sparsity_lib.install import installed

UP = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
DOWN = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8)
#: Sparsities of CATS' gate: 20 to 60% of the FFN.
CATS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: 16 sequences of 256 tokens; for Gemma's head of 262,144 tokens every 4th token is predicted.
TEXT = {"sequences": 16, "length": 256}
EVERY = {"smollm2-135m-instruct": 1, "gemma3-270m": 4}
DTYPE = "bfloat16"


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and line of the grid (an up target with all down targets), and one for CATS."""
    wanted = [{"model": name, "points": line, "text": TEXT, "every": EVERY[name], "dtype": DTYPE,
               "calibration": common.CALIBRATION} for name in common.MODELS for line in lines(UP, DOWN, CATS)]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_measure, params)) for params in wanted]), strict=True):
        own = data.setdefault(params["model"], {"points": []})
        own["points"] += found["points"]
        own.update(dense=found["dense"], ids=found["ids"])
    return data, {"up": UP, "down": DOWN, "cats": CATS, "text": TEXT, "every": EVERY, "dtype": DTYPE,
                  "calibration": common.CALIBRATION}, [0]


def lines(up: tuple, down: tuple, cats: tuple) -> list[list[dict]]:
    """The grid's points as plain data, in groups that are measured together; the dense corner is left out."""
    grid = [[{"method": "scap", "up": u, "down": d} for d in down if u or d] for u in up]
    return [line for line in (*grid, [{"method": "cats", "gate": g} for g in cats]) if line]


def _measure(params: dict) -> dict:
    opened = common.opened(params["model"], params["dtype"])
    model, ids = opened.model, common.evaluation_ids(opened.tokenizer, **params["text"])
    recipes = [scap_common.recipe_of(point) for point in params["points"]]
    plans = dict(enumerate(fit_many(recipes, opened.fitted, opened.tokenizer, **params["calibration"])))
    found = evaluate(model, {str(i): plan for i, plan in plans.items()}, ids, every=params["every"])
    points = []
    for i, point in enumerate(params["points"]):
        with installed(model, plans[i]):
            counted = account(model, ids=ids[:4])
        points.append({**point, "quality": found[str(i)].to_json(), **scap_common.shares(counted)})
    return {"points": points, "dense": found["dense"].to_json(), "ids": common.fingerprint(ids)}
