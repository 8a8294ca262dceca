"""What a benchmark run returns: scores with standard errors, and every document's outcome for paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from sparsity_lib.checks import count
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.groups import weighted_members


class Score(NamedTuple):
    """A share of right answers in [0, 1], its standard error, and the number of documents behind it."""

    mean: float
    stderr: float
    documents: int


class Interval(NamedTuple):
    """A difference and its 95% bootstrap interval."""

    mean: float
    lo: float
    hi: float


@dataclass(frozen=True)
class TaskResult:
    """One task.

    `metrics` are lm-eval's own aggregates; `stderr` the standard error of each mean, s / sqrt(n) from the documents'
    values (NaN for one document or a metric that is no mean). `values` holds the outcome of each document in `doc_ids`
    (its row in the split): 0 or 1 for acc, acc_norm and exact_match, the log-likelihood for perplexity. `available` counts the
    documents of the split.
    """

    task: str
    split: str
    num_fewshot: int
    available: int
    metrics: dict[str, float]
    stderr: dict[str, float]
    doc_ids: tuple[int, ...]
    values: dict[str, tuple[float, ...]]

    @property
    def documents(self) -> int:
        """Number of documents scored."""
        return len(self.doc_ids)


@dataclass(frozen=True)
class BenchmarkResult:
    """Results by task, and how they were obtained. `seconds` is the wall time of the whole run."""

    tasks: dict[str, TaskResult]
    limit: int | None
    seed: int
    backend: str
    seconds: float
    lm_eval: str

    def score(self, name: str, metric: str | None = None) -> Score:
        """Score of a task (by its primary metric, or `metric`) or of a group.

        A group's standard error treats its tasks as independent samples: sqrt(sum of (weight x stderr)^2).

        Raises
        ------
        SparsityError
            If the name is unknown or a member was not run.
        """
        parts = weighted_members(name, {task: result.documents for task, result in self.tasks.items()}, metric)
        mean = math.fsum(weight * self.tasks[task].metrics[of] for task, of, weight in parts)
        variance = math.fsum((weight * self.tasks[task].stderr[of]) ** 2 for task, of, weight in parts)
        return Score(mean, math.sqrt(variance), sum(self.tasks[task].documents for task, _, _ in parts))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN becomes None."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchmarkResult:
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises
        ------
        SparsityError
            If `data` is not such a dictionary.
        """
        try:
            tasks = {name: _task_result(task) for name, task in data["tasks"].items()}
            return cls(**{**data, "tasks": tasks})
        except (KeyError, TypeError, AttributeError) as error:
            raise SparsityError(f"This is not a saved benchmark result: {error!r}.") from error


def paired_difference(
    a: BenchmarkResult, b: BenchmarkResult, group: str, n_boot: int = 2000, seed: int = 0
) -> Interval:
    """Score of `a` minus score of `b` on a task or group, with a paired bootstrap interval (2.5% to 97.5%).

    Documents are drawn with replacement within each task, and each drawn document counts for both models, so that what
    makes a document hard for both cancels. Needs both results on the same documents.

    Raises
    ------
    SparsityError
        If the two runs scored different documents or few-shot counts, or a task of the group is missing.
    """
    count("n_boot", n_boot, 1)
    parts = weighted_members(group, {task: result.documents for task, result in a.tasks.items()})
    generator = np.random.default_rng(seed)
    mean, draws = 0.0, np.zeros(n_boot)
    for task, metric, weight in parts:
        left, right = a.tasks[task], b.tasks.get(task)
        if right is None or left.doc_ids != right.doc_ids or left.num_fewshot != right.num_fewshot:
            raise SparsityError(
                f"The results differ in what {task} was run on: expected the same documents and few-shot count. "
                "Fix: run both with the same limit, seed and num_fewshot."
            )
        difference = np.asarray(left.values[metric]) - np.asarray(right.values[metric])
        # Drawing n documents with replacement and averaging depends only on how often each distinct difference is drawn.
        distinct, times = np.unique(difference, return_counts=True)
        drawn = generator.multinomial(len(difference), times / len(difference), size=n_boot)
        draws += weight * (drawn @ distinct) / len(difference)
        mean += weight * float(difference.mean())
    lo, hi = np.quantile(draws, [0.025, 0.975])
    return Interval(mean, float(lo), float(hi))


def standard_error(values: tuple[float, ...]) -> float:
    """s / sqrt(n) with the sample standard deviation, as lm-eval computes it for means; NaN below two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _task_result(data: Mapping[str, Any]) -> TaskResult:
    stderr = {metric: math.nan if value is None else value for metric, value in data["stderr"].items()}
    values = {metric: tuple(each) for metric, each in data["values"].items()}
    return TaskResult(**{**data, "stderr": stderr, "values": values, "doc_ids": tuple(data["doc_ids"])})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
