"""Rows, differences and the verdict of the LoRA recovery, from its stored runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult, TaskResult, standard_error
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.evaluate.groups import weighted_members
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments.claws_lora import LIMITS
from sparsity_lib.experiments.claws_report import label
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect, not_testable


def restricted(result: BenchmarkResult, to: BenchmarkResult) -> BenchmarkResult:
    """`result` on the documents of `to` only, which must be among its own: a smaller run, without running it."""
    tasks = {name: _restricted(result.tasks[name], task.doc_ids) for name, task in to.tasks.items()}
    return dataclasses.replace(result, tasks=tasks, limit=to.limit)


def _restricted(task: TaskResult, documents: tuple[int, ...]) -> TaskResult:
    place = {document: i for i, document in enumerate(task.doc_ids)}
    values = {metric: tuple(each[place[d]] for d in documents) for metric, each in task.values.items()}
    metrics = {metric: float(np.mean(each)) for metric, each in values.items() if metric.startswith("acc")}
    stderr = {metric: standard_error(values[metric]) for metric in metrics}
    return dataclasses.replace(task, doc_ids=documents, values=values, metrics=metrics, stderr=stderr)


def rows_before(
    stored: Mapping[str, Any], benchmarks: Mapping[str, Any], qualities: Mapping[str, Quality]
) -> list[list[Any]]:
    """Rows of the dense model and of the methods without training, on the documents and the text of the recovered models.

    benchmarks: method -> group -> a stored benchmark run; qualities: method -> quality on the recovery's text.
    """
    after = next(iter(next(iter(stored.values())).values()))
    rows = []
    for method, found in qualities.items():
        kl = 0.0 if method == "dense" else found.divergence().value
        row: list[Any] = [label(method), None, Number(kl, ".3f"), None]
        for group in LIMITS:
            whole, part = (BenchmarkResult.from_dict(r[group]) for r in (benchmarks[method], after))
            row += [100 * restricted(whole, part).score(group).mean, None]
        rows.append(row)
    return rows


def rows_after(stored: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Rows: method, seeds, then KL, Avg5 and MMLU after recovery: the mean over seeds, and the spread between them."""
    rows = []
    for method, seeds in stored.items():
        kl = [Quality.from_json(found["quality"]).divergence().value for found in seeds.values()]
        scores = {g: [100 * BenchmarkResult.from_dict(f[g]).score(g).mean for f in seeds.values()] for g in LIMITS}
        after = [Number(float(number), ".3f") for number in (np.mean(kl), np.std(kl, ddof=1))]
        rows.append([f"{label(method)} + LoRA", len(seeds), *after]
                    + [x for g in LIMITS for x in (float(np.mean(scores[g])), float(np.std(scores[g], ddof=1)))])
    return rows


def gain(stored: Mapping[str, Mapping[str, Any]], group: str, draws: int = 2000) -> Interval:
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


def kl_gain(stored: Mapping[str, Mapping[str, Any]], draws: int = 2000) -> Interval:
    """KL of CLAWS minus CATS after recovery, nats per token, with a bootstrap over seeds and, inside them, sequences."""
    quality = {m: [Quality.from_json(found["quality"]) for found in seeds.values()] for m, seeds in stored.items()}
    gap = np.array([np.subtract(a.kl, b.kl) for a, b in zip(quality["claws"], quality["cats"], strict=True)])
    tokens = np.asarray(quality["claws"][0].tokens)
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, len(gap), size=(draws, len(gap), 1))
    sequences = generator.integers(0, gap.shape[1], size=(draws, 1, gap.shape[1]))
    drawn = gap[seeds, sequences].mean(1).sum(-1) / tokens[sequences[:, 0]].sum(-1)
    return Interval(float(gap.mean(0).sum() / tokens.sum()), *(float(q) for q in np.quantile(drawn, [0.025, 0.975])))


WORDS = "with one LoRA recipe for both, MMLU 49.6 against CATS' 42.8 (Gemma-4-E2B-IT)"
#: A score on MMLU, four answers a question, that guessing gives.
GUESSING = 0.25


def verdict_mmlu(stored: Mapping[str, Mapping[str, Any]], dense: BenchmarkResult) -> Verdict:
    """K3: MMLU of CLAWS minus CATS after one LoRA recipe, published as 49.6 - 42.8 points.

    A model that guesses with all of its weights has nothing to lose: then the claim cannot be tested on it.
    """
    score = dense.score("mmlu")
    if score.mean - 1.96 * score.stderr <= GUESSING:
        return not_testable(
            "K3, MMLU", WORDS,
            f"dense, the model scores {100 * score.mean:.1f} +- {196 * score.stderr:.1f}%: not above guessing, so nothing could "
            "be recovered. It takes a model above chance, named as MODEL in sparsity_lib/experiments/claws_lora.py",
            "make results R=claws_lora",
        )
    return _points("K3, MMLU", stored, "mmlu", "MMLU")


def verdict_avg5(stored: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """K3 by Avg5, on which these models do more than guess."""
    return _points("K3, Avg5 instead", stored, "avg5", "Avg5 in place of MMLU")


def _points(claim: str, stored: Mapping[str, Mapping[str, Any]], group: str, what: str) -> Verdict:
    found = gain(stored, group)
    return effect(
        claim, WORDS, f"SmolLM2-135M-Instruct at 50% FFN density, three seeds, {what} in points, CLAWS minus CATS",
        number=found.value, low=found.low, high=found.high, published=6.8,
    )
