"""The search: rows, points, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments.claws_report import cell, label, points, short
from sparsity_lib.experiments.compare_report import SINGLE, at_share, best_single, curve, quality_points
from sparsity_lib.experiments.compare_search import kl_of_candidates
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect

Data = Mapping[str, Any]
NAMES = {"rotate": {"none": "nothing rotated", "head": "head rotated", "ffn": "gate, up and head rotated",
         "all": "q, k, v, gate, up and head rotated"}, "head": {"dense": "dense head", "inputs": "head's inputs",
         "refined": "head read twice"}, "allocation": {"uniform": "one density", "spread": "shared budget"},
         "score": {"magnitude": "size", "column_norm": "size times column norm", "saliency": "size times gradient"},
         "select": {"threshold": "by thresholds"}}
#: How much smaller than the best single method's KL the search has to be.
ASKED = 0.75


def named(candidate: Data) -> str:
    """A candidate in words."""
    words = [NAMES["rotate"][candidate["rotate"]], NAMES["score"][candidate["score"]]]
    words += [NAMES["select"][candidate["select"]]] if "select" in candidate else []
    words += ["low rank"] if candidate.get("repair", "none") != "none" else []
    few = f" ({100 * candidate['refine']:.1f}% of words)" if "refine" in candidate else ""
    return ", ".join([*words, NAMES["head"][candidate["head"]] + few, NAMES["allocation"][candidate["allocation"]]])


def search_rows(data: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Candidate, and its KL on calibration text by model and share; from best to worst by the mean log, then those that fail."""
    by_name: dict[str, list[float | None]] = {}
    for model in data["models"].values():
        for candidate, kls in kl_of_candidates(model["search"], shares):
            by_name.setdefault(named(candidate), []).extend(kls)

    def order(item: tuple[str, list[float | None]]) -> tuple[int, float]:
        there = [kl for kl in item[1] if kl is not None]
        return len(item[1]) - len(there), float(np.mean(np.log(np.maximum(there, 1e-12)))) if there else 0.0

    ordered = sorted(by_name.items(), key=order)
    return [[name, *(None if kl is None else Number(kl, ".3f") for kl in found)] for name, found in ordered]


def held_out(data: Data, model: str, part: str, share: float) -> Quality | None:
    """The chosen candidate ("chosen") or an ablation on evaluation text, as made for a share (met by rank, not by thresholds)."""
    rows = data["models"][model]["held out"][part]["points"]
    found = next((row for row in rows if abs(row["share"] - share) < 1e-9 and "quality" in row), None)
    return None if found is None else Quality.from_json(found["quality"])


def against(search: Data, quality: Data, methods: Sequence[str]) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """model -> method -> [(share skipped, KL)], the chosen candidate, "spread", last: what `figures.compare.curves` draws."""
    found = quality_points(quality, methods)
    for model in found:
        points = search["models"][model]["held out"]["chosen"]["points"]
        found[model]["spread"] = [(p["shares"]["skipped"], Quality.from_json(p["quality"]).divergence())
                                  for p in points if "quality" in p]
    return found


def allocated(search: Data, share: float) -> dict[str, dict[str, list[float]]]:
    """model -> kind of site -> share of inputs kept by layer, as the chosen candidate's budget was spent at a share."""
    found = {}
    for model, each in search["models"].items():
        point = next((p for p in each["held out"]["chosen"]["points"] if abs(p["share"] - share) < 1e-9), None)
        if point is not None and point.get("recipe", {}).get("allocation"):
            found[model] = point["recipe"]["allocation"]
    return found


def over_best(
    search: Data, quality: Data, model: str, share: float, methods: Sequence[str] = SINGLE
) -> tuple[str, Interval] | None:
    """The best single method at a share, and the chosen candidate's KL over its, paired over sequences."""
    best, own = best_single(quality, model, share, methods), held_out(search, model, "chosen", share)
    if best is None or own is None:
        return None
    return best, ratio_interval(own.kl, curve(quality, model, best).at(share))


def held_out_rows(search: Data, quality: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Model, share (%); KL of the chosen candidate, the best single method, its KL, and their ratio."""
    rows = []
    for model in search["models"]:
        for share in shares:
            own, found = held_out(search, model, "chosen", share), over_best(search, quality, model, share)
            if own is None:
                continue
            best = [None, None, None] if found is None else [
                label(found[0]), cell(curve(quality, model, found[0]).kl_at(share), ".3f"), cell(found[1], ".2f")]
            rows.append([short(model), Number(100 * share, ".0f"), cell(own.divergence(), ".3f"), *best])
    return rows


def ablation_rows(search: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Model, part left out; KL at each share, and over the whole recipe's (paired)."""
    rows = []
    for model, found in search["models"].items():
        for part in found["held out"]:
            row: list[Any] = [short(model), part]
            for share in shares:
                own, base = held_out(search, model, part, share), held_out(search, model, "chosen", share)
                row += [None, None] if own is None or base is None else [
                    cell(own.divergence(), ".3f"), cell(ratio_interval(own.kl, base.kl), ".2f")]
            rows.append(row)
    return rows


def many_rows(data: Data, group: str = "scap7") -> list[list[Any]]:
    """Model, method; mean of the group (%), minus dense, and the search's candidate minus it, both paired (points)."""
    rows = []
    for model, found in data.items():
        results = {at_share(row): BenchmarkResult.from_dict(row["results"][group]) for row in found if "results" in row}
        dense = results[at_share(found[0])]
        own = next((results[at_share(r)] for r in found if r["method"] == "spread" and "part" not in r and "results" in r), None)
        for name, each in results.items():
            ahead = None if own is None or each in (own, dense) else points(own, each, group)
            gap = None if each is dense else points(each, dense, group)
            rows.append([short(model), name, Number(100 * each.score(group).mean, ".1f"), gap, ahead])
    return rows


def verdict_search(search: Data, quality: Data, model: str, share: float, methods: Sequence[str] = SINGLE) -> Verdict | None:
    """Whether the search's KL is a quarter below the best single method's; None where no single method reaches the share."""
    found = over_best(search, quality, model, share, methods)
    if found is None:
        return None
    best, ratio = found
    return effect(
        f"search, {100 * share:.0f}%, {short(model)}", "one recipe beats the best single training-free method by a quarter in KL",
        f"KL of the search's recipe over that of {label(best)} at {100 * share:.0f}% of all weights skipped, held-out text",
        number=ratio.value, low=ratio.low, high=ratio.high, published=ASKED, null=1.0)
