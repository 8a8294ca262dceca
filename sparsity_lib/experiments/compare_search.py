"""The search beyond the papers: combinations of parts on calibration text, then the best one and its ablations held out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sparsity_lib import results
from sparsity_lib.accounting import weights_per_token
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments import common
from sparsity_lib.experiments.compare_common import DTYPE, Bench, Point, bench_for, points_of
from sparsity_lib.experiments.compare_quality import measured
from sparsity_lib.experiments.compare_report import Curve
from sparsity_lib.experiments.scap_grid import EVERY, TEXT
from sparsity_lib.fit import fit, fit_many
from sparsity_lib.methods.larosa import density_for_share
from sparsity_lib.methods.spread import combined
from sparsity_lib.parts.select import Threshold
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.sensitivity import Curves, curves
from sparsity_lib.sites import find_sites

SHARES = (0.4, 0.5, 0.6)
#: Where the candidate that was chosen is measured on evaluation text: as far as every method is.
ALONG = (0.1, 0.2, 0.3, *SHARES, 0.7)
#: All of it calibration text, in orders of its own: statistics, costs of dropping, and what candidates are judged by.
FITTED = {"tokens": 4096, "length": 512, "seed": 0}
COSTS = {"tokens": 1024, "length": 256, "seed": 9}
JUDGED = {"tokens": 1024, "length": 256, "seed": 5}
HEAD_EVERY = {"smollm2-135m-instruct": 8, "gemma3-270m": 32}
JUDGED_EVERY = {"smollm2-135m-instruct": 2, "gemma3-270m": 8}
#: Thresholds meet a share within a few hundredths: quality at the shares above lies between measured points.
AROUND = (0.3, *SHARES)
FEW = 0.005
#: Transform, score, selection and repair at the blocks: fitted together, with every head and allocation; or, with `refine`, with
#: the head whose likely words are read in full, another share of them.
BLOCKS: tuple[dict[str, Any], ...] = (
    {"rotate": "none", "score": "magnitude"}, {"rotate": "none", "score": "column_norm"}, {"rotate": "none", "score": "saliency"},
    {"rotate": "head", "score": "magnitude"}, {"rotate": "head", "score": "saliency"},
    {"rotate": "ffn", "score": "magnitude"}, {"rotate": "ffn", "score": "saliency"}, {"rotate": "all", "score": "magnitude"},
    {"rotate": "none", "score": "magnitude", "repair": "low_rank"},
    {"rotate": "head", "score": "magnitude", "repair": "low_rank"},
    {"rotate": "none", "score": "magnitude", "select": "threshold"},
    {"rotate": "none", "score": "column_norm", "select": "threshold"},
    {"rotate": "head", "score": "magnitude", "select": "threshold"},
    {"rotate": "head", "score": "magnitude", "refine": FEW},
)
HEADS = ("dense", "inputs", "refined")
ALLOCATIONS = ("uniform", "spread")

Candidate = Mapping[str, Any]


def candidates(blocks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every head and allocation with these blocks; costs are not known where a repair changes them."""
    allocations = ALLOCATIONS if blocks.get("repair", "none") == "none" else ("uniform",)
    heads = HEADS[-1:] if "refine" in blocks else HEADS[1:] if blocks["rotate"] == "head" else HEADS
    return [{**blocks, "head": head, "allocation": allocation} for head in heads for allocation in allocations]


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and choice of parts at the blocks; then one a model for the candidate chosen, and one an ablation."""
    found = searched(checkpoint)
    best = chosen(found)
    data = {name: {"search": found[name], **own} for name, own in tried(checkpoint, best).items()}
    return {"chosen": best, "models": data}, {
        "blocks": BLOCKS, "heads": HEADS, "allocations": ALLOCATIONS, "shares": SHARES, "fitted": FITTED, "costs": COSTS,
        "judged": JUDGED, "along": ALONG, "text": TEXT, "every": EVERY, "dtype": DTYPE,
        "calibration": common.CALIBRATION}, [0, 5, 9]


def searched(checkpoint) -> dict[str, list[dict[str, Any]]]:
    """Every candidate by model; no evaluation text is looked at."""
    wanted = [{"model": name, "candidates": candidates(blocks), "shares": shares_of(blocks), "fitted": FITTED, "costs": COSTS,
               "judged": JUDGED, "head_every": HEAD_EVERY[name], "every": JUDGED_EVERY[name], "dtype": DTYPE}
              for name in common.MODELS for blocks in BLOCKS]
    rows: dict[str, list[dict[str, Any]]] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(search, params)) for params in wanted]), strict=True):
        rows.setdefault(params["model"], []).extend(found)
    return rows


def tried(checkpoint, best: Candidate) -> dict[str, dict[str, Any]]:
    """The candidate chosen on all models, and its ablations, held out, by model."""
    labels = {"chosen": best, **ablations(best)}
    wanted = [(label, {"model": name, "candidate": candidate, "shares": ALONG if label == "chosen" else shares_of(candidate),
                       "costs": COSTS, "text": TEXT, "every": EVERY[name], "head_every": HEAD_EVERY[name],
                       "calibration": common.CALIBRATION, "dtype": DTYPE})
              for name in common.MODELS for label, candidate in labels.items()]
    items = checkpoint.items([(params, partial(held_out, params)) for _, params in wanted])
    data: dict[str, dict[str, Any]] = {}
    for (label, params), found in zip(wanted, items, strict=True):
        own = data.setdefault(params["model"], {"held out": {}})
        own["held out"][label] = {"candidate": params["candidate"], "points": found["points"]}
        own.update(dense=found["dense"], ids=found["ids"])
    return data


def shares_of(parts: Mapping[str, Any]) -> tuple[float, ...]:
    """Shares to make recipes for, so that their quality is known at `SHARES`."""
    return AROUND if parts.get("select") == "threshold" else SHARES


def parts_of(candidate: Candidate) -> dict[str, Any]:
    """The options of `combined`."""
    return {key: value for key, value in candidate.items() if key != "allocation"}


def wanted(
    bench: Bench, candidate: Candidate, shares: Sequence[float], costs: Curves | None
) -> list[tuple[float, Recipe | str]]:
    """The candidate's recipe at every share, or the reason why there is none."""
    found: list[tuple[float, Recipe | str]] = []
    for share in shares:
        try:
            if candidate["allocation"] == "spread":
                found.append((share, costs.allocate(share)))
            else:
                make = partial(combined, **parts_of(candidate))
                found.append((share, make(density_for_share(make, bench.model, share, transforms=True))))
        except SparsityError as error:
            found.append((share, str(error)))
    return found


def search(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Candidates with the same parts at the blocks, judged on calibration text."""
    from sparsity_lib.assets.texts import token_sequences

    bench = bench_for(params["model"], TEXT)
    held, bench.ids = bench.ids, token_sequences(bench.tokenizer, "calibration", **params["judged"])
    try:
        fitted, known = measured_costs(bench, params["candidates"], params["costs"], params["head_every"], params["fitted"])
        recipes = [(c, share, recipe) for c in params["candidates"]
                   for share, recipe in wanted(bench, c, params["shares"], known.get(c["head"]))]
        points = made(bench, fitted, [(share, recipe) for _, share, recipe in recipes], params["fitted"])
        thresholds = params["candidates"][0].get("select") == "threshold"
        rows = measured(bench, points, params["every"], None if thresholds else partial(by_design, bench))["points"]
    finally:
        bench.ids = held
    for (candidate, _, _), row in zip(recipes, rows, strict=True):
        row.pop("recipe", None)  # allocations of a hundred sites, made anew by the same costs
        row["candidate"] = candidate
    return rows


def by_design(bench: Bench, point: Point) -> dict[str, float]:
    """Share of all weights that a point is to skip; top-k meets it, so that no text has to be counted for every candidate."""
    sites, total = find_sites(bench.model), weights_per_token(bench.model)
    return {"skipped": point.change.recipe.skipped(sites, total, transforms=True)}


def measured_costs(
    bench: Bench, candidates: Sequence[Candidate], costs: Mapping[str, Any], every: int, calibration: Mapping[str, Any]
) -> tuple[Plan, dict[str, Curves]]:
    """The statistics that all candidates share, and the costs of dropping for each way to treat the head.

    The candidates have the same parts at the blocks, and nothing that is fitted depends on densities or allocations: one fit
    does for all, and one pass for the blocks' costs.
    """
    options = parts_of(candidates[0])
    heads = list(dict.fromkeys(c["head"] for c in candidates))
    fitted = fit(combined(0.5, **{**options, "head": "dense" if heads == ["dense"] else "inputs"}), bench.fitted, bench.tokenizer,
                 **calibration)
    found: dict[str, Curves] = {}
    for head in dict.fromkeys(c["head"] for c in candidates if c["allocation"] == "spread"):
        plan = carried(fitted, combined(0.5, **{**options, "head": head}))
        known = next(iter(found.values()), None)
        found[head] = curves(plan, bench.fitted, bench.tokenizer, every=every, known=known, **costs)
    return fitted, found


def carried(fitted: Plan, recipe: Recipe) -> Plan:
    """The same statistics under a recipe with the same parts, some sites or repairs without statistics left out or added."""
    sites = {rule.site for rule in recipe.rules}
    tensors, widths = ({name: value for name, value in found.items() if name.split(".")[1] in sites}
                       for found in (fitted.tensors, fitted.widths))
    return Plan(recipe, tensors, widths, fitted.calibration)


def made(
    bench: Bench, fitted: Plan, found: Sequence[tuple[float, Recipe | str]], calibration: Mapping[str, Any]
) -> list[Point]:
    """Points of recipes that share one fit, but for thresholds, which have their own at every density."""
    recipes = [recipe for _, recipe in found if isinstance(recipe, Recipe)]
    if any(isinstance(rule.select, Threshold) for recipe in recipes for rule in recipe.rules):
        return points_of(found, fit_many(recipes, bench.fitted, bench.tokenizer, **calibration))
    return points_of(found, (carried(fitted, recipe) for recipe in recipes))


def held_out(params: Mapping[str, Any]) -> dict[str, Any]:
    """One candidate on evaluation text."""
    bench = bench_for(params["model"], params["text"])
    points = candidate_points(bench, params["candidate"], params["shares"], params["costs"], params["head_every"],
                              params["calibration"])
    return measured(bench, points, params["every"])


def chosen(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The candidate with the lowest mean log KL over models and `SHARES`, of those that reach every share on every model."""
    known: dict[str, dict[str, Any]] = {}
    scores: dict[str, float] = {}
    for rows in found.values():
        for candidate, kls in kl_of_candidates(rows, SHARES):
            key = str(sorted(candidate.items()))
            known[key] = candidate
            scores[key] = scores.get(key, 0.0) + sum(math.inf if kl is None else math.log(max(kl, 1e-12)) for kl in kls)
    best = min(scores, key=lambda key: (scores[key], key))
    if math.isinf(scores[best]):
        raise SparsityError("No candidate reaches every share on every model. Fix: search lower shares.")
    return known[best]


def kl_of_candidates(
    rows: Sequence[Mapping[str, Any]], shares: Sequence[float]
) -> list[tuple[dict[str, Any], list[float | None]]]:
    """Each candidate of one model's rows, and its KL at `shares`, None where it has none.

    Top-k meets the shares that recipes are made for; what thresholds skip is counted, and read off between measured points.
    """
    together: list[tuple[dict[str, Any], list[Mapping[str, Any]]]] = []
    for row in rows:
        if not together or together[-1][0] != row["candidate"]:
            together.append((dict(row["candidate"]), []))
        together[-1][1].append(row)
    found = []
    for candidate, own in together:
        points = [(row["share"], Quality.from_json(row["quality"])) for row in own if "quality" in row]
        if candidate.get("select") == "threshold":
            line = Curve.of(own)
            kls = [None if line is None else line.kl_at(share) for share in shares]
        else:
            kls = [next((p.divergence() for s, p in points if abs(s - share) < 1e-9), None) for share in shares]
        found.append((candidate, [None if kl is None else kl.value for kl in kls]))
    return found


def current() -> dict[str, Any]:
    """The candidate that the kept search chose.

    Raises
    ------
    SparsityError
        If no search was kept.
    """
    return dict(results.load("compare_search").data["chosen"])


def candidate_points(
    bench: Bench, candidate: Candidate, shares: Sequence[float], costs: Mapping[str, Any], every: int,
    calibration: Mapping[str, Any],
) -> list[Point]:
    """A candidate at every share, its costs measured anew."""
    fitted, known = measured_costs(bench, [candidate], costs, every, calibration)
    return made(bench, fitted, wanted(bench, candidate, shares, known.get(candidate["head"])), calibration)


def ablations(best: Candidate) -> dict[str, dict[str, Any]]:
    """The chosen candidate without one of its parts each."""
    plain = {key: value for key, value in best.items() if key != "refine"}  # says nothing where no word is read twice
    found = {
        "without rotation": {**best, "rotate": "none"}, "rotation at the head only": {**best, "rotate": "head"},
        "without refined words": {**plain, "head": "inputs"},
        "without the head": {**plain, "head": "dense", "rotate": "none" if best["rotate"] == "head" else best["rotate"]},
        "without the shared budget": {**best, "allocation": "uniform"},
        "by rank": {key: value for key, value in best.items() if key != "select"},
        "more refined words": {key: value for key, value in best.items() if key != "refine"},
        "by plain size": {**best, "score": "magnitude"}, "without low rank": {**best, "repair": "none"},
    }
    return {label: each for label, each in found.items() if {"repair": "none", **each} != {"repair": "none", **best}}
