"""Benchmarks through lm-eval, on local documents, with every document's outcome kept."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_lib import project
from sparsity_lib.checks import count
from sparsity_lib.errors import refuse, unknown
from sparsity_lib.evaluate.bench_result import (
    BenchmarkResult,
    Interval,
    Score,
    TaskResult,
    paired_difference,
    standard_error,
)
from sparsity_lib.evaluate.groups import GROUPS, resolve
from sparsity_lib.evaluate.tasks import TASKS, write_tasks
from sparsity_lib.progress import track

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BenchmarkResult", "Interval", "Score", "TaskResult", "load_tasks", "paired_difference", "run_benchmarks",
    "sampled_documents",
]

#: lm-eval's own default seed for drawing few-shot examples, so that its command line draws the same ones.
FEWSHOT_SEED = 1234
BACKENDS = ("prefix", "hf")


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Iterable[str],
    *,
    limit: int | None = None,
    num_fewshot: int | Mapping[str, int] | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    backend: str = "prefix",
    max_new_tokens: int | None = None,
) -> BenchmarkResult:
    """Score a model on benchmarks.

    Parameters
    ----------
    model, tokenizer
        A Hugging Face causal language model, dense or sparse, and its tokenizer.
    tasks
        A task or group name, or several: see `evaluate.groups.GROUPS` and
        `evaluate.tasks.TASKS`. "mmlu" is 57 tasks.
    limit
        Documents per task (per subject for MMLU), drawn at random from the split with `seed`: the same ones for every
        model, and those of a smaller limit are among those of a larger one. None, or more than there are: all.
    num_fewshot
        Examples in the prompt, for all tasks or by task or group name; by default none. MMLU's come from its dev split
        (at most 5), ARC's from validation; for the other tasks, whose training splits are not at hand, lm-eval draws them
        from the evaluated split, never the document itself.
    batch_tokens
        Tokens of one forward pass.
    backend
        "prefix" packs requests with common prefixes (`evaluate.prefix_lm.PrefixLM`), "hf" is lm-eval's
        own.
    max_new_tokens
        Where an answer is written, it ends here at the latest; by default lm-eval's own 256. Answers are a few words in
        TriviaQA, a paragraph in GSM8K; a broken model that does not know an end costs that much time.

    Raises
    ------
    SparsityError
        For an unknown task, group or backend, a limit or max_new_tokens below 1, a negative or too large few-shot count, or
        a model without a language model head; AssetError if the data cannot be had.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if limit is not None:
        count("limit", limit, 1)
    if max_new_tokens is not None:
        count("max_new_tokens", max_new_tokens, 1)
    count("seed", seed, 0)
    names = resolve(tasks)
    shots = _fewshot_counts(names, num_fewshot)

    import lm_eval
    from lm_eval.evaluator import evaluate

    from sparsity_lib.evaluate.bench_quiet import quiet_lm_eval
    from sparsity_lib.evaluate.prefix_lm import PrefixLM

    started = time.perf_counter()
    lm = PrefixLM(model, tokenizer, batch_tokens=batch_tokens, packed=backend == "prefix")
    loaded = load_tasks(names, shots, max_new_tokens)
    with quiet_lm_eval():
        available = {name: len(task.eval_docs) for name, task in loaded.items()}
        chosen = {name: sampled_documents(name, available[name], limit, seed) for name in loaded}
        some = {name: ids for name, ids in chosen.items() if len(ids) < available[name]}
        # Standard errors come from the values of the documents, so lm-eval's bootstrap is switched off.
        outcome = evaluate(lm, {"tasks": loaded}, samples=some, bootstrap_iters=0, log_samples=True)
    results = {
        name: _task_result(name, shots[name], available[name], outcome["results"][name], outcome["samples"][name])
        for name in loaded
    }
    return BenchmarkResult(
        tasks=results, limit=limit, seed=seed, backend="prefix" if lm.packed else "hf",
        seconds=time.perf_counter() - started, lm_eval=lm_eval.__version__,
    )


def load_tasks(
    names: Iterable[str], shots: Mapping[str, int] | None = None, max_new_tokens: int | None = None
) -> dict[str, Task]:
    """lm-eval's task objects over local documents, by name, with few-shot counts (0) and the longest answer set if given."""
    from lm_eval.tasks import TaskManager

    from sparsity_lib.evaluate.bench_quiet import quiet_lm_eval

    names = tuple(names)
    with quiet_lm_eval(), project.scratch("sparsity-tasks-") as folder:
        manager = TaskManager(include_path=str(write_tasks(folder, names)), include_defaults=False)
        loaded = {name: manager.load(name)["tasks"][name] for name in track(names, "Loading benchmarks")}
        for name, task in loaded.items():
            task.set_config("num_fewshot", (shots or {}).get(name, 0))
            task.set_fewshot_seed(FEWSHOT_SEED)
            if task.config.process_docs is not None:  # lm-eval would process all documents again at every access
                task.dataset[TASKS[name].evaluated] = task.task_docs
                task.set_config("process_docs", None)
            if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    return loaded


def sampled_documents(name: str, available: int, limit: int | None, seed: int) -> list[int]:
    """Rows of a split to score, in ascending order: a random sample that depends on the task's name and the seed only.

    The first documents would not do: some sets are ordered by source or label.
    """
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(available)
    return sorted(order[:limit].tolist())


def _fewshot_counts(names: tuple[str, ...], num_fewshot: int | Mapping[str, int] | None) -> dict[str, int]:
    given = num_fewshot if isinstance(num_fewshot, Mapping) else dict.fromkeys(names, num_fewshot or 0)
    counts = dict.fromkeys(names, 0)
    for key, shots in given.items():
        members = resolve(key)
        if not set(members) & set(names):
            raise unknown("task in num_fewshot", key, [*names, *(group for group in GROUPS if set(resolve(group)) <= set(names))])
        count("num_fewshot", shots, 0)
        for name in members:
            if name.startswith("mmlu_") and shots > 5:
                raise refuse("num_fewshot", shots, "at most 5 for MMLU", "its dev split has 5 examples a subject")
            if shots > 50:
                raise refuse("num_fewshot", shots, "at most 50", "longer prompts exceed the models' context")
            if name in counts:
                counts[name] = shots
    return counts


def _task_result(
    name: str, shots: int, available: int, aggregate: Mapping[str, Any], samples: list[dict[str, Any]]
) -> TaskResult:
    """Gather lm-eval's aggregates and per-document records of one task, by the filter that it is scored with."""
    spec = TASKS[name]
    ordered = sorted((s for s in samples if s["filter"] == spec.filter), key=lambda sample: sample["doc_id"])
    values = {metric: tuple(float(sample[metric]) for sample in ordered) for metric in spec.metrics}
    metrics = {metric: float(aggregate[f"{metric},{spec.filter}"]) for metric in spec.metrics}
    stderr = {
        metric: standard_error(each) if metric != "perplexity" else float("nan") for metric, each in values.items()
    }
    return TaskResult(
        task=name, split=spec.evaluated, num_fewshot=shots, available=available, metrics=metrics, stderr=stderr,
        doc_ids=tuple(int(sample["doc_id"]) for sample in ordered), values=values,
    )
