"""Rows and points of the N:M chapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality, difference
from sparsity_lib.experiments.claws_report import cell, perplexity, short
from sparsity_lib.experiments.nm_common import PATTERNS, UNSTRUCTURED
from sparsity_lib.report import Number

EVERY = (*PATTERNS, UNSTRUCTURED)
#: Words of a point's options.
WORDS = {
    "act": "|x|", "clact": "CLACT", "amber": "Amber", "wina": "|x| times column norm", "gradient": "|x| times gradient",
    "spts": "S-PTS", "dpts": "D-PTS", "lpts": "L-PTS", "var": "VAR", "ls": "LS", "low_rank": "low rank",
    "magnitude": "magnitude", "wanda": "Wanda",
}


#: Repairs that need no training, and the two that do, as a claim of its own each.
LIGHT = ({"transform": "spts"}, {"transform": "dpts"}, {"repair": ["var"]}, {"transform": "lpts"}, {"repair": ["ls"]})


def by_score(data: Mapping[str, Any], scores: Sequence[str]) -> dict[str, dict[str, list[tuple[str, Interval]]]]:
    """model -> score -> [(pattern, KL)]: what `figures.nm.patterns` draws."""
    return {model: {score: [(p, quality(one(data, model, p, score=score)).divergence()) for p in EVERY] for score in scores}
            for model in data}


def beside_weights(data: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[str, Interval]]]]:
    """model -> method -> [(pattern, KL)]: what `figures.nm.against_weights` draws."""
    found = {}
    for model in data:
        own = [(p, quality(one(data, model, p)).divergence()) for p in EVERY]
        weights = {score: [(p, quality(one(data, model, p, on="weights", score=score)).divergence()) for p in EVERY]
                   for score in ("wanda", "magnitude")}
        found[model] = {"nm": own, **weights}
    return found


def all_points(data: Mapping[str, Any], model: str) -> list[Mapping[str, Any]]:
    """Every point of a model, whatever its group."""
    return [p for found in data[model]["groups"].values() for p in found]


def one(data: Mapping[str, Any], model: str, pattern: str, on: str = "activations", **options: Any) -> Mapping[str, Any]:
    """The point with just these options; |x| is the score of activations where none is named."""
    if on == "activations":
        options.setdefault("score", "act")
    for point in all_points(data, model):
        own = {k: v for k, v in point.items() if k in ("score", "transform", "repair", "sites", "dense")}
        if on == "activations":
            own.setdefault("score", "act")
        if (point["on"], point["pattern"], own) == (on, pattern, options):
            return point
    raise KeyError((model, pattern, on, options))


def quality(point: Mapping[str, Any]) -> Quality:
    """The stored sums of a point."""
    return Quality.from_json(point["quality"])


def named(point: Mapping[str, Any]) -> str:
    """What is done beside the pattern."""
    words = [point[key] for key in ("score", "transform") if key in point and (key != "score" or point["score"] != "act")]
    return " + ".join(WORDS[word] for word in [*words, *point.get("repair", ())]) or "nothing"


def score_rows(data: Mapping[str, Any], scores: Sequence[str]) -> list[list[Any]]:
    """Model, pattern, weights skipped (%), perplexity by |x|, and KL by each score."""
    rows = []
    for model in data:
        for pattern in EVERY:
            plain = one(data, model, pattern)
            kls = [cell(quality(one(data, model, pattern, score=score)).divergence(), ".3f") for score in scores]
            skipped = Number(100 * plain["shares"]["skipped"], ".1f")
            rows.append([short(model), pattern, skipped, perplexity(quality(plain)), *kls])
    return rows


def repair_rows(data: Mapping[str, Any], pattern: str) -> list[list[Any]]:
    """Model, what is added to plain |x|, weights skipped (%), KL, KL less plain's (paired), perplexity; from best to worst."""
    rows = []
    for model in data:
        base = quality(one(data, model, pattern))
        found = [p for p in all_points(data, model)
                 if p["on"] == "activations" and p["pattern"] == pattern and not {"sites", "dense"} & p.keys()]
        for point in sorted(found, key=lambda p: quality(p).divergence().value):
            own = quality(point)
            gap = None if named(point) == "nothing" else cell(difference(own, base), "+z.3f", atol=0.003)
            skipped = Number(100 * point["shares"]["skipped"], ".1f")
            rows.append([short(model), named(point), skipped, cell(own.divergence(), ".3f"), gap, perplexity(own)])
    return rows


def training_rows(data: Mapping[str, Any], trained: Mapping[str, Any], model: str, pattern: str) -> list[list[Any]]:
    """How LS was trained or what of it is kept; a block's error after training over that before, median over blocks (%), KL, and
    KL less that of no repair (paired). The first row is the way of all other tables."""
    rows = []
    base, usual = quality(one(data, model, pattern)), one(data, model, pattern, repair=["ls"])
    halves = {f"its {half}s alone": found for half, found in trained["halves"].items()}
    for way, found in {"as in the tables above": usual, **halves, **trained["ways"]}.items():
        left = Number(100 * float(np.median(np.divide(found["after"], found["before"]))), ".0f") if "after" in found else None
        own = quality(found)
        rows.append([way, left, cell(own.divergence(), ".3f"), cell(difference(own, base), "+z.3f", atol=0.003)])
    return rows


def weight_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model, pattern; KL of activations by |x|, of weights by Wanda and by magnitude; Wanda's over the activations' (paired)."""
    rows = []
    for model in data:
        for pattern in EVERY:
            own = quality(one(data, model, pattern))
            others = [quality(one(data, model, pattern, on="weights", score=score)) for score in ("wanda", "magnitude")]
            ratio = cell(ratio_interval(others[0].kl, own.kl), ".2f")
            rows.append([short(model), pattern, *(cell(q.divergence(), ".3f") for q in (own, *others)), ratio])
    return rows


def site_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model, what is pruned, weights skipped (%), KL, KL per percent of all weights skipped."""
    rows = []
    for model in data:
        found = [p for p in all_points(data, model) if {"sites", "dense"} & p.keys()]
        for point in found:
            what = f"{point['sites'][0]} alone" if "sites" in point else f"all but those that read {point['dense'][0]}"
            kl, skipped = quality(point).divergence(), 100 * point["shares"]["skipped"]
            each = cell(Interval(*(v / skipped for v in (kl.value, kl.low, kl.high))), ".4f")
            rows.append([short(model), what, Number(skipped, ".1f"), cell(kl, ".3f"), each])
    return rows


def drops(data: Mapping[str, Any], model: str, coarse: str, fine: str) -> Interval:
    """KL at the coarse pattern over KL at the fine one, paired over sequences."""
    return ratio_interval(*(quality(one(data, model, p)).kl for p in (coarse, fine)))


def energy_rows(data: Mapping[str, Any], laws: Mapping[str, Mapping[str, float]]) -> list[list[Any]]:
    """Model and site; share of the square norm kept by each pattern, median over layers (%), then the laws' own rows."""
    rows = [[law, "in theory", *(Number(100 * kept[p], ".1f") for p in EVERY), None] for law, kept in laws.items()]
    for model, sites in data.items():
        for site, found in sites.items():
            shares = [Number(100 * float(np.median(found[p])), ".1f", atol=0.5) for p in EVERY]
            rows.append([short(model), site, *shares, Number(float(np.median(found["kurtosis"])), ".0f")])
    return rows
