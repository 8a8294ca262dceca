"""Averages over groups, their errors, and paired comparisons, on hand-made results."""

import dataclasses

import numpy as np
import pytest

from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.bench_result import BenchmarkResult, TaskResult, paired_difference, standard_error
from sparsity_lib.evaluate.groups import GROUPS, resolve
from sparsity_lib.evaluate.tasks import TASKS


def result_of(outcomes: dict[str, list[float]], shots: int = 0) -> BenchmarkResult:
    tasks = {}
    for name, values in outcomes.items():
        metrics = [metric for metric in TASKS[name].metrics if metric.startswith("acc")]
        tasks[name] = TaskResult(
            task=name, split="test", num_fewshot=shots, available=len(values),
            metrics={metric: float(np.mean(values)) for metric in metrics},
            stderr={metric: standard_error(tuple(values)) for metric in metrics},
            doc_ids=tuple(range(len(values))), values={metric: tuple(values) for metric in metrics},
        )
    return BenchmarkResult(tasks=tasks, limit=None, seed=0, backend="prefix", seconds=1.0, lm_eval="0")


def coin(n: int, p: float, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(n) < p).astype(float).tolist()


def test_a_group_of_tasks_weighs_tasks_equally():
    result = result_of({name: coin(20 * (i + 1), 0.5, i) for i, name in enumerate(resolve("avg5"))})
    score = result.score("avg5")
    assert score.mean == pytest.approx(np.mean([task.metrics["acc"] for task in result.tasks.values()]))
    assert score.stderr == pytest.approx(np.sqrt(sum(t.stderr["acc"] ** 2 for t in result.tasks.values())) / 5)
    assert score.documents == 20 + 40 + 60 + 80 + 100


def test_mmlu_weighs_documents_equally_and_is_one_seventh_of_cwic7():
    outcomes = {name: coin(5 + i, 0.3, i) for i, name in enumerate(resolve("mmlu"))}
    rest = {name: coin(30, 0.6, 99 + i) for i, name in enumerate(resolve("cwic7")) if name not in outcomes}
    result = result_of({**outcomes, **rest})
    pooled = np.mean(np.concatenate(list(outcomes.values())))
    assert result.score("mmlu").mean == pytest.approx(pooled)
    assert result.score("cwic7").mean == pytest.approx((pooled + sum(map(np.mean, rest.values()))) / 7)


def test_the_metric_of_a_group_counts():
    result = result_of({name: coin(10, 0.5, i) for i, name in enumerate(resolve("scap7"))})
    task = dataclasses.replace(result.tasks["piqa"], metrics={"acc": 1.0, "acc_norm": 0.0})
    result.tasks["piqa"] = task
    assert result.score("piqa").mean == 0.0 and result.score("piqa", "acc").mean == 1.0
    others = [result.tasks[name].metrics["acc"] for name in resolve("scap7") if name != "piqa"]
    assert result.score("scap7").mean == pytest.approx((sum(others) + 1.0) / 7)
    assert all(metric == "acc" for _, metric in GROUPS["scap7"].members)


def test_paired_intervals_use_the_pairing():
    hard = np.asarray(coin(400, 0.5, 0))
    better = hard.copy()
    better[np.flatnonzero(hard == 0)[:20]] = 1.0  # the same documents right, and 20 more
    a, b = result_of({"piqa": better.tolist()}), result_of({"piqa": hard.tolist()})
    mean, lo, hi = paired_difference(a, b, "piqa", n_boot=4000)
    assert mean == pytest.approx(0.05)
    # Twenty discordant documents of 400: the standard error is sqrt(0.05 x 0.95 / 400) = 0.0109; unpaired it is 0.035.
    assert lo == pytest.approx(0.05 - 1.96 * 0.0109, abs=0.004) and hi == pytest.approx(0.05 + 1.96 * 0.0109, abs=0.004)
    assert paired_difference(b, a, "piqa", n_boot=4000).mean == pytest.approx(-0.05)
    assert paired_difference(a, a, "piqa") == (0.0, 0.0, 0.0)
    assert paired_difference(a, b, "piqa", seed=1) == paired_difference(a, b, "piqa", seed=1)


def test_the_fast_bootstrap_is_the_plain_one():
    names = resolve("avg5")
    a = result_of({name: coin(50, 0.6, i) for i, name in enumerate(names)})
    b = result_of({name: coin(50, 0.5, 10 + i) for i, name in enumerate(names)})
    rng, metric = np.random.default_rng(0), "acc"
    draws = np.zeros(20000)
    for name in names:
        d = np.asarray(a.tasks[name].values[metric]) - np.asarray(b.tasks[name].values[metric])
        draws += d[rng.integers(0, 50, (20000, 50))].mean(axis=1) / 5
    _, lo, hi = paired_difference(a, b, "avg5", n_boot=20000)
    assert (lo, hi) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.005)


def test_unlike_results_are_not_compared():
    a = result_of({"piqa": coin(30, 0.5, 0)})
    longer, prompted = result_of({"piqa": coin(31, 0.5, 0)}), result_of({"piqa": coin(30, 0.5, 0)}, shots=2)
    for other in (longer, prompted, result_of({"boolq": [1.0]})):
        with pytest.raises(SparsityError, match="same documents"):
            paired_difference(a, other, "piqa")
    with pytest.raises(SparsityError, match="n_boot"):
        paired_difference(a, a, "piqa", n_boot=0)


def test_what_was_not_run_has_no_score():
    result = result_of({"piqa": [1.0, 0.0]})
    for name, message in (("avg5", "arc_easy"), ("boolq", "piqa"), ("pika", "piqa")):
        with pytest.raises(SparsityError, match=message):
            result.score(name)
    with pytest.raises(SparsityError, match="acc_norm"):
        result.score("piqa", "acc_nrm")
