"""The search's recipe beside published methods put together by hand, and beside its neighbours: rows and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments.claws_report import cell, label, short
from sparsity_lib.experiments.compare_report import Curve, nearest
from sparsity_lib.experiments.compare_search import kl_of_candidates
from sparsity_lib.experiments.compare_search_report import ASKED, held_out
from sparsity_lib.report import Number
from sparsity_lib.sites import HEAD_IN
from sparsity_lib.verdicts import Verdict, effect

Data = Mapping[str, Any]
AGAIN = "_again"


def words(rival: str) -> str:
    """A rival in words."""
    method, _, head = rival.rpartition("_")
    blocks = "dense blocks" if method == "dense" else label(method)
    return f"{blocks}, head read twice" if head == "again" else f"{blocks}, head included"


def ratio_to(search: Data, rivals: Data, model: str, share: float, rival: str) -> Interval | None:
    """KL of the search's recipe over a rival's at a share, paired over sequences; None where one does not reach it."""
    line, own = Curve.of(rivals[model]["methods"][rival]), held_out(search, model, "chosen", share)
    other = None if line is None else line.at(share)
    return None if own is None or other is None else ratio_interval(own.kl, other)


def best_rival(search: Data, rivals: Data, model: str, share: float) -> tuple[str, Interval] | None:
    """The rival with the least KL at a share, and the search's KL over its."""
    found = {rival: ratio for rival in rivals[model]["methods"]
             if (ratio := ratio_to(search, rivals, model, share, rival)) is not None}
    return max(found.items(), key=lambda item: item[1].value) if found else None


def rival_rows(search: Data, rivals: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Model, rival; at each share its KL, and the search's KL over it."""
    rows = []
    for model in rivals:
        for rival, points in rivals[model]["methods"].items():
            row: list[Any] = [short(model), words(rival)]
            for share in shares:
                line, ratio = Curve.of(points), ratio_to(search, rivals, model, share, rival)
                kl = None if line is None else line.kl_at(share)
                row += [None if kl is None else Number(kl.value, ".3f", rtol=0.05), None if ratio is None else cell(ratio, ".2f")]
            rows.append(row)
    return rows


def preview_rows(rivals: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Model, rival; share of the head's inputs that its first reading keeps (%) at each share: the best on calibration text."""
    rows = []
    for model in rivals:
        for rival, points in rivals[model]["methods"].items():
            if rival.endswith(AGAIN):
                kept = [_preview(nearest(points, share)) for share in shares]
                rows.append([short(model), words(rival), *(None if k is None else Number(100 * k, ".1f") for k in kept)])
    return rows


def _preview(point: Data | None) -> float | None:
    if point is None:
        return None
    return next(rule["select"]["density"] for rule in point["recipe"]["rules"] if rule["site"] == HEAD_IN)


def two_by_two_rows(search: Data, rivals: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Model, with which of the recipe's two main parts; KL over that with neither at each share, paired."""
    parts = {"both": "chosen", "one budget only": "without refined words", "second reading only": "without the shared budget"}
    rows = []
    for model in rivals:
        for name, part in parts.items():
            row: list[Any] = [short(model), name]
            for share in shares:
                own, base = held_out(search, model, part, share), nearest(rivals[model]["neither"], share)
                row.append(None if own is None or base is None else
                           cell(ratio_interval(own.kl, Quality.from_json(base["quality"]).kl), ".2f"))
            rows.append(row)
        kls = [nearest(rivals[model]["neither"], share) for share in shares]
        rows.append([short(model), "neither: its KL",
                     *(None if p is None else cell(Quality.from_json(p["quality"]).divergence(), ".2f") for p in kls)])
    return rows


def words_rows(rivals: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Share of the vocabulary that is read in full (%); KL on calibration text by model and share."""
    found: dict[float, list[Any]] = {}
    for model in rivals:
        for candidate, kls in kl_of_candidates(rivals[model]["words"], shares):
            row = found.setdefault(candidate["refine"], [Number(100 * candidate["refine"], ".0f")])
            row += [None if kl is None else Number(kl, ".3f", rtol=0.05) for kl in kls]
    return [found[share] for share in sorted(found)]


def verdict_rivals(search: Data, rivals: Data, model: str, share: float) -> Verdict | None:
    """Whether the recipe is a quarter better even than published methods put together by hand; None where none reaches."""
    found = best_rival(search, rivals, model, share)
    if found is None:
        return None
    rival, ratio = found
    return effect(
        f"search and rivals, {100 * share:.0f}%, {short(model)}", "the recipe is no mere sum of published methods",
        f"KL of the search's recipe over that of {words(rival)} at {100 * share:.0f}% of all weights skipped, held-out text",
        number=ratio.value, low=ratio.low, high=ratio.high, published=ASKED, null=1.0)
