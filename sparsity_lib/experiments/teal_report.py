"""Rows, curves and verdicts of TEAL's allocations and thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality, difference
from sparsity_lib.experiments.claws_report import cell, perplexity, short
from sparsity_lib.experiments.common import MODELS
from sparsity_lib.experiments.scap_report import arranged
from sparsity_lib.greedy import Path
from sparsity_lib.report import Number
from sparsity_lib.sites import DOWN_IN, O_IN, QKV_IN, UP_IN
from sparsity_lib.verdicts import Verdict, effect

#: In the order of a block.
SITES = (QKV_IN, O_IN, UP_IN, DOWN_IN)


def in_order(data: Mapping[str, Any]) -> dict[str, Any]:
    """The kept data with models and ways in the order in which the book names them."""
    order = ("uniform", "greedy", "greedy, by output", "uniform, symmetric")
    return {model: arranged(ways, order) for model, ways in arranged(data, MODELS).items()}


def quality(data: Mapping[str, Any], model: str, way: str, target: float) -> Quality:
    """The stored sums of one way at one target."""
    return Quality.from_json(data[model][way]["quality"][str(target)])


def curves(data: Mapping[str, Any], targets: Sequence[float]) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """model -> way -> [(share of all weights skipped, KL)]: what `figures.scap.allocation` draws."""
    return {
        model: {way: [(found["shares"][str(t)]["skipped"], quality(data, model, way, t).divergence()) for t in targets]
                for way, found in ways.items()}
        for model, ways in data.items()
    }


def rows(data: Mapping[str, Any], targets: Sequence[float]) -> list[list[Any]]:
    """Model, way and target; share of the linears' and of all weights met (%), perplexity, KL, KL less `uniform`'s (paired)."""
    found = []
    for model, ways in data.items():
        for target in targets:
            base = quality(data, model, "uniform", target)
            for way in ways:
                own, shares = quality(data, model, way, target), ways[way]["shares"][str(target)]
                gap = None if way == "uniform" else cell(difference(own, base), "+z.3f", atol=0.003)
                met = [Number(100 * shares[of], ".1f", atol=0.3) for of in ("linears", "skipped")]
                kl = cell(own.divergence(), ".3f")
                found.append([short(model), f"{way}, {100 * target:.0f}%", *met, perplexity(own), kl, gap])
    return found


def level_rows(data: Mapping[str, Any], target: float) -> list[list[Any]]:
    """Model and site: the greedy search's sparsity at one target, mean, lowest and highest layer (%)."""
    return [
        [short(model), site, *(Number(100 * float(f(layers)), ".0f", atol=3) for f in (np.mean, np.min, np.max))]
        for model, ways in data.items() for site, layers in arranged(ways["greedy"]["levels"][str(target)], SITES).items()
    ]


def threshold_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model and site: the symmetric threshold over the quantile of |x| at half of the inputs, median and range over layers."""
    found = []
    for model, ways in data.items():
        by_site: dict[str, list[float]] = {}
        for name, (exact, symmetric) in ways["uniform, symmetric"]["thresholds"].items():
            by_site.setdefault(name.split(".")[1], []).append(symmetric / exact)
        for site, ratios in arranged(by_site, SITES).items():
            found.append([short(model), site, *(Number(float(f(ratios)), ".3f") for f in (np.median, np.min, np.max))])
    return found


def verdict_greedy(data: Mapping[str, Any], model: str, target: float = 0.5, way: str = "greedy") -> Verdict:
    """Greedy over uniform allocation: the ratio of their KL at one target."""
    own, base = (np.array(quality(data, model, w, target).kl) for w in (way, "uniform"))
    found = ratio_interval(own, base)
    note = ", by output" if way == "greedy, by output" else ""
    return effect(
        f"TEAL, {short(model)}{note}", "a greedy allocation within each block loses less than a uniform one",
        f"KL of the greedy allocation over the uniform one's at {target:.0%}; a tenth less is asked for",
        number=found.value, low=found.low, high=found.high, published=0.9, null=1.0)


def levels(data: Mapping[str, Any], target: float) -> dict[str, dict[str, list[float]]]:
    """model -> site -> the greedy search's sparsity by layer at one target: what `figures.teal.levels` draws."""
    return {model: arranged(ways["greedy"]["levels"][str(target)], SITES) for model, ways in data.items()}


def step_rows(path: Path, layer: int) -> list[list[Any]]:
    """Of one block's search: step, what each site's next step would move the output by, and the site that was raised."""
    found = []
    for step, errors in enumerate(path.errors[layer].tolist(), start=1):
        if all(math.isnan(e) for e in errors):  # this block was done earlier than others
            break
        best = min((e, i) for i, e in enumerate(errors) if not math.isnan(e))[1]
        found.append([str(step), *(None if math.isnan(e) else Number(e, ".1f", rtol=0.05) for e in errors), path.groups[best]])
    return found


@torch.no_grad()
def largest_channel(model: nn.Module, ids: Tensor) -> float:
    """Share of the square norm of a block's output that its largest channel holds, median over blocks; first tokens, which
    are large in another way, left out."""
    states = model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
    channels = [h[:, 1:].double().square().sum((0, 1)) for h in states]
    return float(np.median([float(c.max() / c.sum()) for c in channels]))


def furthest_apart(layers: Sequence[Tensor], sparsity: float) -> tuple[Tensor, float, float]:
    """Of activations by layer those for which both readings of the threshold differ most by their ratio, and the two: the
    quantile of |x|, and the quantile of x at 0.5 + sparsity / 2."""
    found = []
    for x in layers:
        exact, symmetric = float(x.abs().flatten().quantile(sparsity)), float(x.flatten().quantile(0.5 + sparsity / 2))
        found.append((abs(math.log(symmetric / exact)) if min(symmetric, exact) > 0 else math.inf, x, exact, symmetric))
    return max(found, key=lambda item: item[0])[1:]
