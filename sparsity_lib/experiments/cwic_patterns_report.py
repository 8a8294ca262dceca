"""Rows and verdicts of the chapter on where granular models compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bootstrap import Interval, mean_interval, resample
from sparsity_lib.experiments.claws_report import cell
from sparsity_lib.experiments.cwic_tokens import KINDS
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect, kept, not_testable

#: In the order of a block.
ROLES = ("q", "k", "v", "o", "gate", "ffn")
#: Percent of tokens by which a channel that is always on may fall short of all.
ALWAYS = 10.0
#: Permutations of the test on questions.
PERMUTATIONS = 10_000
Data = Mapping[str, Any]


def density_rows(data: Data, model: str) -> list[list[Any]]:
    """Matrix, share of its weights read: mean over layers with its interval, least and most of a layer."""
    found = []
    density = data[model]["frequencies"]["density"]
    for role in (*ROLES, "head"):
        values = np.asarray(density[role])
        mean = cell(mean_interval(100 * values), ".1f") if len(values) > 1 else Number(100 * float(values[0]), ".1f")
        ends = [Number(100 * float(v), ".1f") if len(values) > 1 else None for v in (values.min(), values.max())]
        found.append(["up and down" if role == "ffn" else role, mean, *ends])
    return found


def kind_rows(data: Data, model: str) -> list[list[Any]]:
    """Kind of token, how many, weights read over those of all other kinds' tokens in percent, with intervals over texts."""
    texts = data[model]["kinds"]["texts"]
    return [[kind, KINDS[kind], sum(t[kind][1] for t in texts if kind in t), cell(found, "+.1f", atol=0.5)]
            for kind in KINDS if kind != "other" and (found := beside_other(texts, kind)) is not None]


def beside_other(texts: Sequence[Mapping[str, Any]], kind: str) -> Interval | None:
    """Percent that a token of a kind reads more than one of the kind "other", over texts that have both; None without two."""
    chosen = [t for t in texts if kind in t and "other" in t]
    if len(chosen) < 2:
        return None
    sums = np.asarray([[*t[kind], *t["other"]] for t in chosen], dtype=float)

    def share(rows: np.ndarray) -> np.ndarray:
        total = rows.sum(-2)
        return 100 * (total[..., 0] / total[..., 1] / (total[..., 2] / total[..., 3]) - 1)

    low, high = np.quantile(share(sums[resample(len(sums))]), [0.025, 0.975])
    value = float(share(sums))
    return Interval(value, float(min(low, value)), float(max(high, value)))


def by_difficulty(found: Mapping[str, Any]) -> tuple[Interval, float]:
    """Percent by which a token of an easy question reads less or more than one of a challenging one; and how likely so large a
    difference is by chance (a permutation test of both means)."""
    easy, hard = (np.asarray(found[config]["read"], dtype=float) for config in ("ARC-Easy", "ARC-Challenge"))
    drawn = [values[resample(len(values), seed=seed)].mean(1) for seed, values in enumerate((easy, hard))]
    low, high = np.quantile(100 * (drawn[0] / drawn[1] - 1), [0.025, 0.975])
    value = 100 * float(easy.mean() / hard.mean() - 1)
    both, generator = np.concatenate([easy, hard]), np.random.default_rng(0)
    gap = abs(easy.mean() - hard.mean())
    extreme = 0
    for _ in range(PERMUTATIONS):
        mixed = generator.permutation(both)
        extreme += abs(mixed[: len(easy)].mean() - mixed[len(easy) :].mean()) >= gap
    return Interval(value, float(min(low, value)), float(max(high, value))), (extreme + 1) / (PERMUTATIONS + 1)


def arc_rows(data: Data) -> list[list[Any]]:
    """Model, questions, tokens of an easy and a challenging one, percent less compute, p."""
    rows = []
    for model, views in data.items():
        found = views["arc"]
        gap, chance = by_difficulty(found)
        tokens = [Number(float(np.mean(found[c]["tokens"])), ".1f") for c in ("ARC-Easy", "ARC-Challenge")]
        number = sum(len(found[c]["read"]) for c in found)
        rows.append([model, number, *tokens, cell(gap, "+.2f", atol=0.3), Number(chance, ".3f", atol=0.02)])
    return rows


def brightest(channels: Sequence[Sequence[float]]) -> Interval:
    """Percent of tokens for which the channel that passes most does so, over layers; channels as [layer][channel], percent."""
    table = np.asarray(channels, dtype=float)
    return mean_interval(table[:, table.mean(0).argmax()])


def agreement(channels: Sequence[Sequence[int]]) -> Interval:
    """Mean correlation between two layers of how often each channel passes, with its interval over channels."""
    table = np.asarray(channels, dtype=float)
    table = table[table.std(1) > 0]
    layers = len(table)

    def mean(chosen: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            found = np.corrcoef(chosen)
        return float(np.nanmean(found[np.triu_indices(layers, 1)]))

    drawn = [mean(table[:, index]) for index in resample(table.shape[1], 500)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = mean(table)
    return Interval(value, float(min(low, value)), float(max(high, value)))


def early_late(run: Mapping[str, Any], role: str = "gate") -> Interval:
    """Correlation of how often channels pass at the first milestone and at the last, over layers (their interval's units)."""
    first, last = (np.asarray(run["milestones"][i]["channels"][role], dtype=float) for i in (0, -1))
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, last, strict=True) if a.std() > 0 and b.std() > 0]
    return mean_interval(found)


def by_head(channels: Sequence[Sequence[int]], heads: int) -> tuple[Interval, float]:
    """Share of the variance of o's channel frequencies that lies between heads, mean over layers; and what chance would give."""
    found = []
    for layer in np.asarray(channels, dtype=float):
        groups = layer.reshape(heads, -1)
        if layer.var() > 0:
            found.append(float(groups.mean(1).var() / layer.var()))
    width = np.asarray(channels).shape[1]
    return mean_interval(found), (heads - 1) / (width - 1)


def along_vocabulary(found: Mapping[str, Any]) -> Interval:
    """Rank correlation of a head stripe's place and how often it is read; interval over stripes."""
    values = np.asarray(found["head"], dtype=float)

    def rho(index: np.ndarray) -> float:
        ranks = [np.argsort(np.argsort(v)) for v in (index, values[index])]
        return float(np.corrcoef(*ranks)[0, 1])

    drawn = [rho(np.sort(index)) for index in resample(len(values), 500)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    value = rho(np.arange(len(values)))
    return Interval(value, float(min(low, value)), float(max(high, value)))


def verdicts(data: Data, run: Mapping[str, Any]) -> list[Verdict]:
    """A7 to A12 and F5, on each model; `run` is the small network's schedule with its channels at the milestones."""
    found = []
    for model, views in data.items():
        own, kinds = views["frequencies"], views["kinds"]["texts"]
        gate = agreement(own["channels"]["gate"])
        found.append(_effect(
            f"A7, {model}", "some residual channels fire for almost every input in all layers",
            "correlation between two layers of how often each input of the gate passes; 0.3 was set here", gate, 0.3))
        top = brightest(own["channels"]["gate"])
        found.append(kept(
            f"A7, {model}, always", "some residual channels fire for almost every input in all layers",
            "percent of tokens for which the gate's input that passes most does so, over layers, less 100; "
            f"{ALWAYS:g} are allowed",
            number=top.value - 100, low=top.low - 100, high=top.high - 100, margin=ALWAYS))
        v, *rest = (np.asarray(own["density"][role]) for role in ("v", "k", "o", "q"))
        gap = mean_interval(100 * (v - np.max(rest, axis=0)))
        found.append(_effect(
            f"A8, {model}, V", "V is the densest, then K and O",
            "points by which v's share read lies above the densest of q, k and o, over layers; 5 were set here", gap, 5.0))
        found.append(dip(own["density"], model))
        share, chance = by_head(own["channels"]["o"], own["heads"])
        found.append(_effect(
            f"A9, {model}", "whole heads of O are consistently high or low",
            f"share of the variance of o's channels that lies between heads, beyond chance ({chance:.2f}); 0.3 was set here",
            Interval(share.value - chance, share.low - chance, share.high - chance), 0.3))
        found.append(_effect(
            f"A10, {model}", "head stripes of the vocabulary's start are read more often",
            "rank correlation of a stripe's place and how often it is read; -0.3 was set here", along_vocabulary(own), -0.3))
        gap, chance = by_difficulty(views["arc"])
        found.append(_effect(
            f"A11, {model}", "ARC-Easy takes 5% less compute than ARC-Challenge",
            f"percent of compute a token of an easy question takes beside a challenging one (p = {chance:.3f})", gap, -5.0))
        for kind in ("punctuation", "filler", "template", "repeated"):
            if (gap := beside_other(kinds, kind)) is not None:
                found.append(_effect(
                    f"A12, {kind}, {model}", "punctuation, filler, role tokens and quoted spans take little",
                    f"percent of compute a token of this kind ({KINDS[kind]}) takes beside all else; -5 was set here", gap, -5.0))
    if run["milestones"] and "channels" in run["milestones"][0]:
        found.append(_effect(
            "A7, training", "the channels are there after 100 steps and stay",
            f"correlation of channel frequencies at step {run['milestones'][0]['step']} and at the end, over layers; 0.5 was set "
            "here",
            early_late(run), 0.5))
    return found


def dip(density: Mapping[str, Sequence[float]], model: str) -> Verdict:
    """A8: the middle layers read less."""
    words = "a dip in the middle layers"
    table = 100 * np.mean([density[role] for role in ROLES], axis=0)
    third = len(table) // 3
    if third < 2:
        why = f"{len(table)} layers have no middle to speak of"
        return not_testable(f"A8, {model}, dip", words, why, "make results R=cwic_patterns")
    inner, outer = table[third:-third], np.concatenate([table[:third], table[-third:]])
    drawn = inner[resample(len(inner))].mean(1) - outer[resample(len(outer), seed=1)].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(inner.mean() - outer.mean())
    return _effect(
        f"A8, {model}, dip", words, "points by which the middle third of the layers reads more than the rest, mean over "
        "matrices; -2 was set here", Interval(value, float(min(low, value)), float(max(high, value))), -2.0)


def _effect(claim: str, words: str, experiment: str, found: Interval, published: float) -> Verdict:
    return effect(claim, words, experiment, number=found.value, low=found.low, high=found.high, published=published)
