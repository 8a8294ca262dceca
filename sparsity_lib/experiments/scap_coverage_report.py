"""Rows and verdicts on SCAP's reach: models covered, targets met, and sequences decoded together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bootstrap import Interval, mean_interval, median_interval
from sparsity_lib.experiments.claws_report import short
from sparsity_lib.experiments.scap_coverage import relative_change
from sparsity_lib.experiments.scap_report import in_points
from sparsity_lib.report import Number
from sparsity_lib.sites import DOWN_IN
from sparsity_lib.verdicts import Verdict, effect, kept

#: What table 4 reaches at least, on Falcon-7B.
PUBLISHED = 0.38


def chosen(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The measured point that the search chose."""
    return next((t for t in found["tried"] if t["point"] == found["chosen"]), None)


def met(found: Mapping[str, Any]) -> float:
    """Sparsity met over the layers that were targeted: all linears where attention was among them, else the FFN's;
    of a mixer its two projections.
    """
    point = chosen(found)
    if point is None:
        return 0.0
    everything = "attention" in point["point"] or point["point"]["method"] == "mixer"
    return point["shares"]["linears" if everything else "ffn"]


def coverage_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model, what it is, trained here, dense score, relative change on the odd half (%), sparsity met (%), targets (%)."""
    rows = []
    for name, found in data.items():
        point, own = chosen(found), "yes" if found["trained_here"] else "no"
        if point is None:
            rows.append([short(name), found["what"], own, None, None, Number(0.0, ".0f"), "none of those tried"])
            continue
        targets = ", ".join(f"{group} {100 * point['point'][group]:.0f}" for group in ("attention", "up", "down", "in", "out")
                            if group in point["point"])
        star = "*" if point["point"].get("center", "none") != "none" else ""
        change = in_points(relative_change(point, found["dense"]))
        rows.append([short(name) + star, found["what"], own, score(found["dense"]), change, Number(100 * met(found), ".0f"),
                     targets])
    return rows


def score(dense: Mapping[str, Any]) -> Number:
    """The dense network's score: the share of units that are right in percent, or its perplexity."""
    if dense["scale"] == "log":
        return Number(dense["more"]["perplexity"], ".1f")
    return Number(100 * sum(dense["right"]) / sum(dense["weights"]), ".1f")


def target_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model and way, site and target; actual sparsity over texts and layers: mean, lowest, highest, median distance (%)."""
    rows = []
    for model, ways in data.items():
        for way, targets in ways.items():
            for target, found in targets.items():
                for kind in next(iter(found.values())):
                    layers = np.array([each[kind] for each in found.values()])  # [texts, layers]
                    rows.append([f"{short(model)}, {way}", f"{kind}, {100 * float(target):.0f}%",
                                 *(Number(100 * float(v), ".1f", atol=1) for v in (layers.mean(), layers.min(), layers.max())),
                                 Number(100 * float(np.median(np.abs(layers - float(target)))), ".1f", atol=0.5)])
    return rows


def target_points(
    data: Mapping[str, Any], model: str, way: str, kind: str = DOWN_IN
) -> dict[int, list[tuple[float, str, float]]]:
    """layer -> [(target, task or text, actual)]: what `figures.scap.targets` draws."""
    points: dict[int, list[tuple[float, str, float]]] = {}
    for target, found in data[model][way].items():
        for text, kinds in found.items():
            for layer, actual in enumerate(kinds[kind]):
                points.setdefault(layer, []).append((float(target), text, actual))
    return points


def beam_rows(data: Mapping[str, Any], batch: Mapping[str, Any] | None = None) -> list[list[Any]]:
    """Kind and site, sequences together; share any of them needs (%), if they were independent (%), share that all skip (%), and
    the share measured for neighbouring and strange tokens of a dense model's text (bench/batch), where there is one."""
    rows = []
    for kind, widths in data.items():
        for width, sites in sorted(widths.items(), key=lambda item: int(item[0])):
            for site, found in sites.items():
                needed = mean_interval(np.array(found["needed"]))
                order = "neighbours" if kind == "beams" else "strangers"
                read = {} if batch is None else batch["read"].get(site, {}).get(order, {})
                other = Number(100 * read[width], ".1f") if width in read else None
                rows.append([f"{kind}, {site}", int(width), in_points(needed, ".1f"), Number(100 * found["by_chance"], ".1f"),
                             Number(100 * (1 - needed.value), ".1f"), other])
    return rows


def lost(data: Mapping[str, Any], kind: str, width: str, site: str = DOWN_IN) -> Interval:
    """Share of what one sequence may skip that is lost when `width` are decoded together, over texts."""
    skipped = [1 - np.array(data[kind][w][site]["needed"]) for w in ("1", width)]
    if len(skipped[0]) == len(skipped[1]):  # the same prompts: paired
        ratio = 1 - skipped[1] / skipped[0]
    else:  # batches of several texts: each against the mean of single ones
        ratio = 1 - skipped[1] / skipped[0].mean()
    return mean_interval(ratio)


def verdict_coverage(data: Mapping[str, Any]) -> Verdict:
    """S5: the least sparsity among all models that stays within one percent. "Every model" is decided by the weakest."""
    values = [100 * met(found) for found in data.values()]
    return effect(
        "S5", "within -1% of the baseline 38 to 59% sparsity on every model: dense, 4- and 8-bit, MoE, Mamba2, encoder, vision",
        f"sparsity met by the setting chosen for each of {len(values)} models, in percent: the least of them (the most: "
        f"{max(values):.0f}); no interval, for each is one of a few settings",
        number=min(values), low=min(values), high=min(values), published=100 * PUBLISHED)


def verdict_tolerance(data: Mapping[str, Any], name: str, margin: float = 1.0) -> Verdict:
    """S5 for one model: the change on units that the search did not see."""
    change = relative_change(chosen(data[name]), data[name]["dense"])
    return kept(
        f"S5, {short(name)}", "the score stays within -1% of the baseline",
        f"relative change in percent with {100 * met(data[name]):.0f}% met, on the half of the units that was not searched on",
        number=100 * change.value, low=100 * change.low, high=100 * change.high, margin=margin)


def verdict_targets(data: Mapping[str, Any], model: str, way: str, kind: str = DOWN_IN) -> Verdict:
    """S6: how far actual sparsity is from its target, in points, median over layers, tasks and targets."""
    apart = [abs(actual - target) for points in target_points(data, model, way, kind).values() for target, _, actual in points]
    found = median_interval([100 * a for a in apart])
    return kept(
        f"S6, {short(model)}, {way}", "actual sparsity aligns closely with its target across layers and tasks",
        f"distance of the two at {kind} in points, negative, median over layers, texts and targets; 5 are allowed",
        number=-found.value, low=-found.high, high=-found.low, margin=5.0)


def verdict_beams(data: Mapping[str, Any], width: str = "8") -> Verdict:
    """S8: what of the skipped inputs is lost to beams."""
    found = lost(data, "beams", width)
    return effect(
        "S8", "the overlap of sparse positions clearly falls with beam width",
        f"share of what one sequence skips at down's inputs that {width} beams cannot skip together; half of it is clear",
        number=found.value, low=found.low, high=found.high, published=0.5)
