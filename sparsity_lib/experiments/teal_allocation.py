"""TEAL: greedy against uniform allocation, and the quantile of |x| against the release's symmetric one, on both models."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.accounting import account
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common, scap_common
from sparsity_lib.experiments.scap_grid import EVERY, TEXT
from sparsity_lib.fit import fit_many
from sparsity_lib.greedy import Path
from sparsity_lib.install import installed
from sparsity_lib.methods.teal import teal, teal_greedy, threshold_gap
from sparsity_lib.plan import Plan

#: Share of each block's weights that is left unread by design.
TARGETS = (0.25, 0.4, 0.5, 0.6)
WAYS = ("uniform", "greedy", "uniform, symmetric", "greedy, by output")
DTYPE = "bfloat16"
#: Text of the greedy search, which runs each block some hundred times on all of it.
SEARCH = {"tokens": 1024, "length": 256}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and way: quality and shares at every target; the greedy one with the levels it chose."""
    searches = {"greedy": {"search": SEARCH}, "greedy, by output": {"search": {**SEARCH, "error": "outputs"}}}
    wanted = [{"model": name, "way": way, "targets": TARGETS, "text": TEXT, "every": EVERY[name], "dtype": DTYPE,
               "calibration": common.CALIBRATION, **searches.get(way, {})} for name in common.MODELS for way in WAYS]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_measure, params)) for params in wanted]), strict=True):
        data.setdefault(params["model"], {})[params["way"]] = found
    return data, {"ways": WAYS, "targets": TARGETS, "text": TEXT, "every": EVERY, "dtype": DTYPE, "search": SEARCH,
                  "calibration": common.CALIBRATION}, [0]


def _measure(params: dict) -> dict:
    opened, targets = common.opened(params["model"], params["dtype"]), params["targets"]
    model, ids = opened.model, common.evaluation_ids(opened.tokenizer, **params["text"])
    plans, more = _plans(opened, params)
    found = evaluate(model, {str(t): plan for t, plan in zip(targets, plans, strict=True)}, ids, every=params["every"])
    shares = {}
    for target, plan in zip(targets, plans, strict=True):
        with installed(model, plan):
            shares[str(target)] = scap_common.shares(account(model, ids=ids[:4]))
    return {"quality": {name: q.to_json() for name, q in found.items()}, "shares": shares, **more}


def _plans(opened: common.Opened, params: dict) -> tuple[list[Plan], dict[str, Any]]:
    """Plans at every target, and what is kept besides: the levels by layer, or how far both readings of t lie apart."""
    model, tokenizer, targets = opened.fitted, opened.tokenizer, params["targets"]
    if "search" in params:
        path = teal_greedy(model, tokenizer, target=max(targets), **{"error": "all", **params["search"]})
        return path.plans(targets, model, tokenizer, **params["calibration"]), levels(path, targets)
    threshold = "symmetric" if params["way"].endswith("symmetric") else "quantile"
    recipes = [teal(scap_common.kept(target), threshold=threshold) for target in targets]
    plans = fit_many(recipes, model, tokenizer, **params["calibration"])
    if threshold == "quantile":
        return plans, {}
    gaps = threshold_gap(model, 0.5, tokenizer, **params["calibration"])
    return plans, {"thresholds": {name: list(pair) for name, pair in gaps.items()}}


def levels(path: Path, targets: tuple[float, ...]) -> dict[str, Any]:
    """Sparsity by target, site and layer that the search chose."""
    return {"levels": {str(t): dict(zip(path.groups, path.at(t).T.tolist(), strict=True)) for t in targets}}
