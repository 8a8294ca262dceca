"""Verdicts of the N:M chapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.evaluate.bootstrap import ratio_interval
from sparsity_lib.evaluate.quality import difference
from sparsity_lib.experiments.claws_report import points, short
from sparsity_lib.experiments.nm_common import UNSTRUCTURED
from sparsity_lib.experiments.nm_report import drops, named, one, quality
from sparsity_lib.experiments.nm_task_report import HARD, HELPED, change, place_of, relative_drop, spread
from sparsity_lib.verdicts import Verdict, effect, kept, not_testable


def verdict_weights(data: Mapping[str, Any], model: str, pattern: str = "8:16") -> Verdict:
    """N1 by KL: pruned weights are further from the dense model than pruned activations."""
    own, other = quality(one(data, model, pattern)), quality(one(data, model, pattern, on="weights", score="wanda"))
    found = ratio_interval(other.kl, own.kl)
    return effect(
        f"N1, {short(model)}", "pruning activations preserves generation better than pruning weights at equal sparsity",
        f"KL with {pattern} weights (Wanda) over KL with {pattern} activations (|x|); that it is larger by a tenth was set here",
        number=found.value, low=found.low, high=found.high, published=1.1, null=1.0)


def verdict_written(data: Mapping[str, Any], model: str, task: str, pattern: str = "8:16") -> Verdict:
    """N1 by what the model writes: activations minus weights, in points."""
    own, other = (data[model][place_of(data[model], p)]["written"][task] for p in (
        {"on": "activations", "pattern": pattern}, {"on": "weights", "pattern": pattern, "score": "wanda"}))
    found = points(*(BenchmarkResult.from_dict(r) for r in (own, other)), task)
    return effect(
        f"N1, {short(model)}, {task}", "pruning activations preserves generation better than pruning weights at equal sparsity",
        f"{task} in points, {pattern} activations minus {pattern} weights (Wanda); one point was set here",
        number=found.value, low=found.low, high=found.high, published=1.0)


def verdict_parity(data: Mapping[str, Any], model: str, margin: float = 1.0) -> Verdict:
    """N2: 16:32 beside an unstructured half."""
    logs = [quality(one(data, model, p)) for p in (UNSTRUCTURED, "16:32")]
    gap = difference(*logs, "nll")
    value, low, high = (100 * v for v in (gap.value, gap.low, gap.high))
    return kept(
        f"N2, {short(model)}", "16:32 is nearly on par with unstructured sparsity",
        f"loss of unstructured 50% minus loss of 16:32, in hundredths of a nat per token; {margin:g} is allowed",
        number=value, low=low, high=high, margin=margin)


def verdict_ratio(data: Mapping[str, Any], model: str, fine: str, published: float) -> Verdict:
    """N2: how many times closer a finer pattern is than 2:4."""
    found = drops(data, model, "2:4", fine)
    return effect(
        f"N2, {fine}, {short(model)}", f"{fine} loses {published:g} times less than 2:4 (relative drop)",
        f"KL at 2:4 over KL at {fine}, by |x|", number=found.value, low=found.low, high=found.high, published=published, null=1.0)


def verdict_ratio_tasks(data: Mapping[str, Any], model: str, fine: str, published: float, group: str) -> Verdict:
    """The same by the paper's own measure."""
    places = [place_of(data[model], {"on": "activations", "pattern": p}) for p in ("2:4", fine)]
    coarse, own = (relative_drop(data[model], place, group) for place in places)
    # A difference, since a ratio of two drops near zero has no sensible interval.
    found = spread(100 * (coarse - published * own))
    return effect(
        f"N2, {fine}, {short(model)}, tasks", f"{fine} loses {published:g} times less than 2:4 (relative drop)",
        f"relative drop of the seven tasks at 2:4 minus {published:g} times that at {fine}, in percent: above zero, at least so "
        "many times less; one percent was set here",
        number=found.value, low=found.low, high=found.high, published=1.0)


def verdict_repair(data: Mapping[str, Any], model: str, pattern: str = "8:16", **options: Any) -> Verdict:
    """N4: one repair."""
    own, base = quality(one(data, model, pattern, **options)), quality(one(data, model, pattern))
    found = ratio_interval(np.subtract(own.kl, base.kl), base.kl)
    name = named({"score": "act", **options})
    return effect(
        f"N4, {name}, {short(model)}", "light repairs help",
        f"change of KL by {name} at {pattern}, in percent of the unrepaired one; a tenth less was set here",
        number=100 * found.value, low=100 * found.low, high=100 * found.high, published=-10.0)


def verdict_spread(data: Mapping[str, Any], model: str, group: str, pattern: str = "8:16") -> Verdict:
    """N5: whether two tasks carry the drop."""
    place = place_of(data[model], {"on": "activations", "pattern": pattern})
    lost = {inside: relative_drop(data[model], place, group, only=lambda task, inside=inside: (task in HARD) == inside)
            for inside in (True, False)}
    found = spread(100 * (lost[True] - lost[False]))
    return effect(
        f"N5, {short(model)}", "what is lost is lost on ARC-Challenge and HellaSwag",
        f"relative drop at {pattern} on these two minus that on the other five tasks, in percent; one was set here",
        number=found.value, low=found.low, high=found.high, published=1.0)


def verdict_var(data: Mapping[str, Any], model: str, group: str, pattern: str = "8:16") -> Verdict:
    """N5: what VAR brings where the study saw it help."""
    plain, own = (place_of(data[model], {"on": "activations", "pattern": pattern, **more}) for more in ({}, {"repair": ["var"]}))
    found = change(data[model], own, plain, group, *HELPED)
    return effect(
        f"N5, VAR, {short(model)}", "VAR helps WinoGrande and BoolQ",
        f"what VAR adds to these two at {pattern}, in percent of the dense scores; one was set here",
        number=found.value, low=found.low, high=found.high, published=1.0)


def verdict_hardware() -> Verdict:
    """N3 needs hardware that does not exist."""
    return not_testable(
        "N3", "8:16 is the better trade of quality against cost of hardware",
        "no unit multiplies 8:16 activations yet; the picture sets quality against bits of metadata, which is a model of cost",
        "make results R=nm_quality")


def verdict_unverified(data: Mapping[str, Any], model: str, group: str) -> Verdict:
    """N6: the summary page's number, for what it is worth."""
    found = spread(100 * relative_drop(data[model], place_of(data[model], {"on": "activations", "pattern": "8:16"}), group))
    return kept(
        f"N6, {short(model)}", "5.43% lost at 8:16 (a summary of the paper; no row of it could be matched)",
        "relative drop of the seven tasks at 8:16, negative, in percent; 5.43 are allowed",
        number=-found.value, low=-found.high, high=-found.low, margin=5.43)
