"""Mode-centering: where inputs of up and down lie, and the sparsity that none, mean, median and mode reach at equal quality."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsity_lib.attach import attach
from sparsity_lib.distribution import Distribution
from sparsity_lib.experiments import scap_common, small_networks
from sparsity_lib.experiments.scap_networks import Network, Sentences, embedded_text
from sparsity_lib.sites import DOWN_IN, UP_IN, find_sites
from sparsity_lib.sweep import kept_open

CENTERS = ("none", "mean", "median", "mode")
TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Gated networks, in which activations are expected to be centred already: distributions only.
GATED = {"smollm2-135m-instruct": partial(embedded_text, "smollm2-135m-instruct", 4, 256)}
#: Cells of a histogram, between these quantiles of all layers together.
CELLS, QUANTILES = 80, (0.002, 0.998)


def networks() -> dict[str, Callable[[], Network]]:
    """Networks without a gate by name: the sentence encoder, and the small ones that were trained for this book."""
    return {"minilm-l6": Sentences, **small_networks.openers(gated=False)}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a network: its distributions; and for those without a gate the sparse runs of one centre at all targets."""
    wanted: list[tuple[dict[str, Any], Callable[[dict], dict]]] = []
    for name in {**networks(), **GATED}:
        wanted.append(({"network": name, "cells": CELLS, "quantiles": QUANTILES}, _distributions))
        if name not in GATED:
            wanted += [({"network": name, "center": center, "targets": TARGETS}, _ablate) for center in CENTERS]
    items = checkpoint.items([(params, partial(compute, params)) for params, compute in wanted])
    data: dict[str, Any] = {"distributions": {}, "ablation": {}}
    for (params, compute), found in zip(wanted, items, strict=True):
        if compute is _ablate:
            data["ablation"].setdefault(params["network"], {})[params["center"]] = found
        else:
            data["distributions"][params["network"]] = found
    return data, {"centers": CENTERS, "targets": TARGETS, "networks": list(data["distributions"])}, [0]


@kept_open
def _opened(name: str) -> Network:
    return {**networks(), **GATED}[name]()


def _ablate(params: dict) -> dict:
    network, center = _opened(params["network"]), params["center"]
    points = [{"method": "down", "down": s, "center": center} for s in params["targets"]]
    plans = network.fit([scap_common.recipe_of(point) for point in points])
    return {
        "dense": network.score(None).to_json(), "scale": network.scale,
        "points": [{**p, **network.score(plan).to_json()} for p, plan in zip(points, plans, strict=True)],
        "centers": [float(plans[0].tensors[f"{i}.{DOWN_IN}.shift"][0]) if center != "none" else 0.0
                    for i in range(len(plans[0].widths))],
    }


def _distributions(params: dict) -> dict:
    """By place ("up_in", "before" and "after" the activation where that can be seen) a histogram a layer, with its centres."""
    network = _opened(params["network"])
    streams = _watched(network.model)
    try:
        network.run()
    finally:
        for handle in streams.pop("handles"):
            handle.remove()
    return {place: histograms(found) for place, found in streams.items() if found}


def _watched(model: nn.Module) -> dict[str, Any]:
    """Collectors by place and layer, fed in every forward until the handles are removed."""
    sites = find_sites(model)
    found: dict[str, Any] = {"up_in": [], "down_in": [], "before": [], "handles": []}

    def feed(place: str) -> Callable[[Tensor], Tensor]:
        collector = Distribution()
        found[place].append(collector)

        def tap(x: Tensor) -> Tensor:
            collector.update(x.detach())
            return x

        return tap

    for kind in (UP_IN, DOWN_IN):
        for site in sites.of_kind(kind):
            found["handles"].append(attach(model, site, feed(kind)))
    for linear in sites.linears:
        if linear.role == "up" and not any(x.role == "gate" and x.layer == linear.layer for x in sites.linears):
            tap = feed("before")  # of a network without a gate, what its up projection gives goes into the activation
            hook = model.get_submodule(linear.name).register_forward_hook(lambda module, args, out, tap=tap: (tap(out), None)[1])
            found["handles"].append(hook)
    return found


def histograms(layers: list[Distribution], cells: int = CELLS) -> dict[str, Any]:
    """Shares by cell for every layer [layers, cells] on common edges, and each layer's mean, median, mode and deviation."""
    low = min(float(d.quantile(QUANTILES[0])[0]) for d in layers)
    high = max(float(d.quantile(QUANTILES[1])[0]) for d in layers)
    edges = np.linspace(low, high if high > low else low + 1.0, cells + 1)
    return {
        "edges": edges.tolist(), "shares": [np.diff([share(d, float(e)) for e in edges]).tolist() for d in layers],
        "mean": [float(d.mean[0]) for d in layers], "median": [float(d.quantile(0.5)[0]) for d in layers],
        "mode": [d.mode() for d in layers], "std": [float(d.std()[0]) for d in layers],
        "near_zero": [share(d, 0.05) - share(d, -0.05) for d in layers],
        "near_mode": [share(d, d.mode() + 0.05) - share(d, d.mode() - 0.05) for d in layers],
    }


def share(found: Distribution, value: float) -> float:
    """Share of all numbers below `value`."""
    return float(found.share_below(value)[0])
