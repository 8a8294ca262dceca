"""Rows and points on what N:M patterns cost: measured masks (`bench/nm`), and models of hardware that does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity_lib import hardware
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.experiments.claws_report import cell, short
from sparsity_lib.experiments.nm_common import PATTERNS, UNSTRUCTURED
from sparsity_lib.experiments.nm_report import one, quality
from sparsity_lib.nm_facts import choices, comparators, metadata_bits
from sparsity_lib.parts.nm import pattern_of
from sparsity_lib.report import Number

#: What the model is asked about: one projection of an 8-billion model, and an accelerator of today's bandwidth and peaks.
LAYER = hardware.Layer(outputs=14336, inputs=4096)
ACCELERATOR = hardware.Machine(bandwidth=3.35e12, peak=989e12, vector_peak=67e12)
TOKENS = 4096


def gap_closed(data: Mapping[str, Any], model: str, pattern: str) -> Interval:
    """Share of the way from 2:4 to an unstructured half, in KL, that a pattern goes; paired over sequences."""
    coarse, own, free = (quality(one(data, model, p)).kl for p in ("2:4", pattern, UNSTRUCTURED))
    return ratio_interval(np.subtract(coarse, own), np.subtract(coarse, free))


def costs(pattern: str) -> dict[str, float]:
    """Three models of what a pattern costs a unit: bits of metadata, comparators (both an element), choices a multiplier."""
    n, m = pattern_of(pattern)
    return {"bits": metadata_bits(n, m), "comparators": comparators(m), "choices": choices(n, m)}


def trade_points(data: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[str, float, Interval]]]]:
    """cost -> model -> [(pattern, cost, KL by |x|)]: what `figures.nm.trade` draws."""
    return {cost: {model: [(p, costs(p)[cost], quality(one(data, model, p)).divergence()) for p in PATTERNS] for model in data}
            for cost in costs("2:4")}


def trade_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Pattern, three costs, modelled prefill speed-up with selection apart and fused; share of the gap closed by model (%)."""
    rows = []
    for p in PATTERNS:
        own = costs(p)
        speeds = [hardware.speedup(hardware.prefill(LAYER, *pattern_of(p), tokens=TOKENS, fused=fused),
                                   hardware.dense(LAYER, tokens=TOKENS), ACCELERATOR) for fused in (False, True)]
        closed = [None] * len(data) if p == "2:4" else [_percent(gap_closed(data, model, p)) for model in data]
        rows.append([p, Number(own["bits"], ".3f"), Number(own["comparators"], ".1f"), int(own["choices"]),
                     *(Number(s, ".2f") for s in speeds), *closed])
    return rows


def _percent(found: Interval) -> Number:
    return cell(Interval(*(100 * v for v in (found.value, found.low, found.high))), ".0f", atol=1)


def product_rows(bench: Mapping[str, Any]) -> list[list[Any]]:
    """Shape and rule; microseconds, times as fast as the best dense product, mask's microseconds, its share of what it saves (%).

    The mask's time is one thread's in a call of its own; inside the product it is found by the threads that multiply.
    """
    rows = []
    for shape, found in bench["products"].items():
        masks = bench["masks"][shape.rpartition(" ")[2]]["many"]
        for rule in ("threshold", "topk", *PATTERNS):
            cost = masks.get(f"ours {rule}")
            share = None if cost is None else Number(100 * cost / found["saved_us"][rule], ".1f", rtol=0.5)
            measured = (Number(found["times"][rule]["median_us"], ".0f"), Number(found["speedup"][rule], ".2f"))
            named = {"topk": "top-k"}.get(rule, rule)
            rows.append([shape.replace("x", "×"), named, *measured, None if cost is None else Number(cost, ".2f"), share])
    return rows


def prompt_rows(bench: Mapping[str, Any]) -> list[list[Any]]:
    """Pattern; a prompt's mask as a share of the dense product behind it (%): our operator, with VAR, and topk with scatter."""
    return [[p, *(Number(100 * bench["prompt"]["share"][name], ".1f")
                  for name in (f"ours {p}", f"ours {p}, repaired", f"torch {p}"))] for p in PATTERNS]


def mask_points(bench: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """way -> pattern -> [(channels, microseconds a token)]: what `figures.nm.mask_costs` draws."""
    widths = sorted(bench["masks"], key=int)
    return {way: {p: [(int(w), bench["masks"][w]["many"][f"{way} {p}"]) for w in widths] for p in PATTERNS}
            for way in ("ours", "torch")}


def models(data: Mapping[str, Any]) -> list[str]:
    """Names for the columns of `trade_rows`."""
    return [f"gap closed, {short(model)} (%)" for model in data]
