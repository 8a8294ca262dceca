"""From the stored runs of the CLAWS chapter to the rows, points and intervals that its tables and figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsity_lib import style
from sparsity_lib.analysis import jaccard
from sparsity_lib.evaluate.benchmarks import BenchmarkResult, paired_difference
from sparsity_lib.evaluate.bootstrap import Interval, median_interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality, difference
from sparsity_lib.experiments.common import MODELS
from sparsity_lib.observe import activations
from sparsity_lib.parts.select import exact_topk
from sparsity_lib.report import Number
from sparsity_lib.results import Result
from sparsity_lib.verdicts import Verdict, effect, kept

Sweep = Mapping[str, Mapping[str, Any]]


def label(method: str) -> str:
    """A method's name in tables."""
    return style.look(method).label


def short(model: str) -> str:
    """A model's name in tables: the embedded ones shortened, others as they are."""
    return {"smollm2-135m-instruct": "SmolLM2", "gemma3-270m": "Gemma"}.get(model, model)


def perplexity(quality: Quality) -> Number:
    """A perplexity as a table cell; those beyond use without decimals."""
    found = quality.perplexity()
    return cell(found, ".1f" if found.high < 1000 else ".2g")


def cell(interval: Interval, fmt: str = ".2f", rtol: float = 0.05, atol: float = 0.0) -> Number:
    """A table cell with an interval."""
    return Number(interval.value, fmt, interval.low, interval.high, rtol=rtol, atol=atol)


def quality_of(sweep: Sweep, model: str, method: str, density: float) -> Quality:
    """The stored sums of one method, model and density ("dense": any)."""
    if method == "dense":
        return Quality.from_json(sweep[model]["claws"]["quality"]["dense"])
    return Quality.from_json(sweep[model][method]["quality"][str(density)])


def sweep_points(sweep: Sweep, methods: Sequence[str], densities: Sequence[float]) -> dict:
    """model -> method -> [(share of all weights skipped, KL), ...]: what `figures.claws.sweep` draws."""
    return {
        model: {
            method: [
                (sweep[model][method]["shares"][str(d)]["skipped"], quality_of(sweep, model, method, d).divergence())
                for d in densities
            ]
            for method in methods
        }
        for model in sweep
    }


def sweep_rows(sweep: Sweep, methods: Sequence[str], density: float) -> list[list[Any]]:
    """Rows: model, method, weights skipped, perplexity, KL at one density."""
    rows: list[list[Any]] = []
    for model in sweep:
        rows.append([short(model), label("dense"), 0.0, perplexity(quality_of(sweep, model, "dense", density)), None])
        for method in methods:
            quality = quality_of(sweep, model, method, density)
            share = sweep[model][method]["shares"][str(density)]["skipped"]
            rows.append([
                short(model), label(method), 100 * share, perplexity(quality), cell(quality.divergence(), ".3f"),
            ])
    return rows


def gains(sweep: Sweep, method: str, other: str, densities: Sequence[float]) -> dict[str, dict[float, Interval]]:
    """Paired difference of KL, method minus other, by model and density."""
    return {
        model: {
            d: difference(quality_of(sweep, model, method, d), quality_of(sweep, model, other, d)) for d in densities
        }
        for model in sweep
    }


def ratios(sweep: Sweep, method: str, other: str, densities: Sequence[float]) -> dict[str, dict[float, Interval]]:
    """KL of one method over another's, paired over sequences, by model and density."""
    found: dict[str, dict[float, Interval]] = {model: {} for model in sweep}
    for model in sweep:
        for d in densities:
            own, base = (np.array(quality_of(sweep, model, m, d).kl) for m in (method, other))
            found[model][d] = ratio_interval(own, base)
    return found


def apart(sweep: Sweep, model: str, density: float, better: str = "claws", worse: str = "cats") -> bool:
    """Whether the KL interval of one method lies wholly below the other's."""
    left, right = (quality_of(sweep, model, m, density).divergence() for m in (better, worse))
    return left.below(right)


def in_order(result: Result) -> dict[str, dict[str, Any]]:
    """Stored benchmark runs with models and methods in the order in which they were run (JSON keeps none)."""
    methods = result.manifest["params"]["methods"]
    return {model: {method: result.data[model][method] for method in methods} for model in MODELS}


def benchmark_rows(stored: Mapping[str, Any], group: str) -> list[list[Any]]:
    """Rows: model, method, score, standard error, paired difference to dense and to CATS, in points."""
    rows = []
    for model, methods in stored.items():
        results = {method: BenchmarkResult.from_dict(found[group]) for method, found in methods.items()}
        for method, result in results.items():
            score = result.score(group)
            row = [short(model), label(method), 100 * score.mean, 100 * score.stderr]
            for base in ("dense", "cats"):
                row.append(None if method in (base, "dense") else points(result, results[base], group))
            rows.append(row)
    return rows


def points(a: BenchmarkResult, b: BenchmarkResult, group: str) -> Number:
    """Paired difference a - b in percentage points, with its interval."""
    found = paired_difference(a, b, group)
    return Number(100 * found.mean, "+z.1f", 100 * found.lo, 100 * found.hi, rtol=0.05, atol=0.2)


def between(methods: Mapping[str, Any], method: str, base: str, group: str) -> dict[str, Any]:
    """Paired difference method - base in points, as `report.glue_number` takes it."""
    return asdict(points(*(BenchmarkResult.from_dict(methods[m][group]) for m in (method, base)), group))


def task_rows(stored: Mapping[str, Any], model: str) -> tuple[list[str], list[list[Any]]]:
    """A table of single tasks: columns, and a row a task with each method's score in percent."""
    methods = list(stored[model])
    results = {method: BenchmarkResult.from_dict(stored[model][method]["avg5"]) for method in methods}
    rows = []
    for task in results["dense"].tasks:
        scores = [results[method].score(task) for method in methods]
        rows.append([task, scores[0].documents, *(100 * score.mean for score in scores)])
    return ["task", "documents", *map(label, methods)], rows


def oracle_overlap(
    model: nn.Module, ids: Tensor, saliencies: Mapping[str, list[Tensor] | None], density: float
) -> dict[str, list[float]]:
    """Jaccard of each score's mask with the oracle's, by layer.

    `saliencies`: method -> one multiplier [width] a layer, or None for |g| alone.
    """
    gates, products = activations(model, "gate", ids), activations(model, "down_in", ids)
    found: dict[str, list[float]] = {method: [] for method in saliencies}
    for layer, (g, h) in enumerate(zip(gates, products, strict=True)):
        k = max(1, round(density * g.shape[-1]))
        best = exact_topk(h.abs(), k)
        for method, multipliers in saliencies.items():
            score = g.abs() if multipliers is None else g.abs() * multipliers[layer]
            found[method].append(float(jaccard(exact_topk(score, k), best).mean()))
    return found


def verdict_skew(what: str, ginis: Mapping[str, Sequence[float]]) -> Verdict:
    """K1: the Gini coefficient of magnitudes, against an exponential distribution's 0.5 and a Gaussian's 0.41."""
    found = median_interval([value for values in ginis.values() for value in values])
    return effect(
        f"K1, {what}", "per-token activations of gated MLPs are highly skewed",
        f"Gini coefficient of the {what}'s magnitudes per token, median over the layers of both models; more than a "
        "Gaussian's is skewed, as much as an exponential distribution's 0.5 is highly skewed",
        number=found.value, low=found.low, high=found.high, published=0.5, null=float(np.sqrt(2) - 1),
    )


def verdict_avg5(stored: Mapping[str, Any], model: str, margin: float = 1.0) -> Verdict:
    """K2: Avg5 of CLAWS minus dense at 50% FFN density, allowed to lose a point."""
    methods = stored[model]
    number = points(*(BenchmarkResult.from_dict(methods[m]["avg5"]) for m in ("claws", "dense")), "avg5")
    return kept(
        f"K2, {model}", "at 50% FFN density CLAWS recovers dense-level Avg5 (Gemma-4-E2B-IT)",
        "training-free, Avg5 in points against dense; a loss of one point is allowed",
        number=number.value, low=number.low, high=number.high, margin=margin,
    )


def ratio_at_equal_share(sweep: Sweep, model: str, density: float, densities: Sequence[float]) -> float:
    """KL of CLAWS at a density over that of CATS where it skips as much, read off CATS' curve (log KL, linear between points)."""
    points = sweep_points({model: sweep[model]}, ("cats", "claws"), densities)[model]
    share, kl = points["claws"][list(densities).index(density)]
    shares, kls = zip(*sorted((s, k.value) for s, k in points["cats"]), strict=True)
    return kl.value / float(np.exp(np.interp(share, shares, np.log(kls))))


def verdict_reorder(native: Sequence, rotated: Sequence, where: str) -> Verdict:
    """K4: share of the mask that the multiplier exchanges, native gate over rotated inputs; barely: less than half as much."""
    moved = [[1 - item.jaccard for item in items] for items in (native, rotated)]
    found = median_interval(np.asarray(moved[0]) / np.maximum(np.asarray(moved[1]), 1e-6))
    return effect(
        f"K4, {where}", "the multiplier reorders the native gate score but barely moves LaRoSA's rotated-input score",
        f"exchanged share of the top-50% mask, gate over {where}, median over layers; barely: at most half as much",
        number=found.value, low=found.low, high=found.high, published=2.0, null=1.0,
    )


def saliencies(plan, layers: int) -> list[Tensor]:
    """The multipliers of a gate-site plan, layer by layer."""
    return [plan.tensors[f"{layer}.gate.saliency"] for layer in range(layers)]


def first_token(sizes: Tensor) -> float:
    """How many times larger the first token's gradient is than the median position's, median over layers."""
    return float((sizes[:, 0] / sizes[:, 1:].median(1).values).median())


