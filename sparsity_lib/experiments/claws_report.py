"""From the stored runs of the CLAWS chapter to the rows, points and intervals that its tables and figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsity_lib import style
from sparsity_lib.analysis import jaccard
from sparsity_lib.evaluate.benchmarks import BenchmarkResult, paired_difference
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.groups import weighted_members
from sparsity_lib.evaluate.quality import Quality, difference
from sparsity_lib.experiments.claws_lora import LIMITS
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
    return {"smollm2-135m-instruct": "SmolLM2", "gemma3-270m": "Gemma 3"}.get(model, model)


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
    return Number(100 * found.mean, "+.1f", 100 * found.lo, 100 * found.hi, rtol=0.05, atol=0.2)


def task_rows(stored: Mapping[str, Any], model: str) -> tuple[list[str], list[list[Any]]]:
    """A table of single tasks: columns, and a row a task with each method's score in percent."""
    methods = list(stored[model])
    results = {method: BenchmarkResult.from_dict(stored[model][method]["avg5"]) for method in methods}
    rows = []
    for task in results["dense"].tasks:
        scores = [results[method].score(task) for method in methods]
        rows.append([task, scores[0].documents, *(100 * score.mean for score in scores)])
    return ["task", "documents", *map(label, methods)], rows


def lora_rows(stored: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Rows: method, KL before and after, Avg5 and MMLU: means over seeds, and the spread between them."""
    rows = []
    for method, seeds in stored.items():
        kl = [Quality.from_json(found["quality"]).divergence().value for found in seeds.values()]
        scores = {g: [100 * BenchmarkResult.from_dict(f[g]).score(g).mean for f in seeds.values()] for g in LIMITS}
        rows.append([label(method), len(seeds), float(np.mean(kl)), float(np.std(kl, ddof=1))]
                    + [x for g in LIMITS for x in (float(np.mean(scores[g])), float(np.std(scores[g], ddof=1)))])
    return rows


def lora_difference(stored: Mapping[str, Mapping[str, Any]], group: str, draws: int = 2000) -> Interval:
    """CLAWS minus CATS after recovery, in points, with a bootstrap over seeds and, inside them, documents.

    A seed trains both methods on the same data in the same order, and both answer the same documents, so differences
    are taken document by document; each draw picks seeds with replacement, then documents of every task.
    """
    results = {
        method: [BenchmarkResult.from_dict(found[group]) for found in seeds.values()] for method, seeds in stored.items()
    }
    first = results["claws"][0]
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, len(results["claws"]), size=(draws, len(results["claws"])))
    mean, drawn = 0.0, np.zeros(draws)
    for task, metric, weight in weighted_members(group, {t: r.documents for t, r in first.tasks.items()}):
        right = [np.array([r.tasks[task].values[metric] for r in results[m]]) for m in ("claws", "cats")]
        gap = right[0] - right[1]  # [seeds, documents]
        documents = generator.integers(0, gap.shape[1], size=(draws, gap.shape[1]))
        drawn += weight * gap[seeds[:, :, None], documents[:, None, :]].mean((1, 2))
        mean += weight * float(gap.mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(100 * mean, 100 * float(low), 100 * float(high))


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


def median_interval(values: Sequence[float], draws: int = 2000) -> Interval:
    """Median over layers, with the bootstrap interval over them."""
    layers = np.asarray(values, dtype=float)
    drawn = np.median(layers[np.random.default_rng(0).integers(0, len(layers), size=(draws, len(layers)))], axis=1)
    return Interval(float(np.median(layers)), *(float(q) for q in np.quantile(drawn, [0.025, 0.975])))


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


def verdict_lora(stored: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """K3: MMLU of CLAWS minus CATS after one LoRA recipe, published as 49.6 - 42.8 points."""
    found = lora_difference(stored, "mmlu")
    return effect(
        "K3", "with one LoRA recipe for both, MMLU 49.6 against CATS' 42.8 (Gemma-4-E2B-IT)",
        "SmolLM2-135M-Instruct at 50% FFN density, three seeds, MMLU in points, CLAWS minus CATS",
        number=found.value, low=found.low, high=found.high, published=6.8,
    )


def verdict_reorder(native: Sequence, rotated: Sequence) -> Verdict:
    """K4: share of the mask that the multiplier exchanges, native gate over rotated inputs; barely: less than half as much."""
    moved = [[1 - item.jaccard for item in items] for items in (native, rotated)]
    found = median_interval(np.asarray(moved[0]) / np.maximum(np.asarray(moved[1]), 1e-6))
    return effect(
        "K4", "the multiplier reorders the native gate score but barely moves LaRoSA's rotated-input score",
        "exchanged share of the top-50% mask, gate over rotated inputs, median over layers; barely: at most half as much",
        number=found.value, low=found.low, high=found.high, published=2.0, null=1.0,
    )


def saliencies(plan, layers: int) -> list[Tensor]:
    """The multipliers of a gate-site plan, layer by layer."""
    return [plan.tensors[f"{layer}.gate.saliency"] for layer in range(layers)]


def first_token(sizes: Tensor) -> float:
    """How many times larger the first token's gradient is than the median position's, median over layers."""
    return float((sizes[:, 0] / sizes[:, 1:].median(1).values).median())


