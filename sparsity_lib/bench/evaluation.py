"""Seconds of benchmarks: lm-eval's own `hf` model against `PrefixLM`, on the same documents in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsity_lib.assets.benchmarks import benchmark_configs
from sparsity_lib.assets.models import load_model
from sparsity_lib.evaluate.benchmarks import load_tasks, sampled_documents
from sparsity_lib.evaluate.tasks import MMLU_SUBJECTS, TASKS

if TYPE_CHECKING:  # lm-eval takes seconds to import, and whoever lists the results does not need it
    from lm_eval.api.instance import Instance

MODEL = "smollm2-135m-instruct"
#: Every eleventh subject: together their prompts are as long as MMLU's are on average (623 and 630 tokens).
SUBJECTS = tuple(f"mmlu_{subject}" for subject in MMLU_SUBJECTS[5::11])
#: What is scored -> its tasks in lm-eval, and examples in the prompt.
SETS = {
    "ARC-E": (("arc_easy",), 0), "HellaSwag": (("hellaswag",), 0), "PIQA": (("piqa",), 0), "MMLU": (SUBJECTS, 5),
    "BoolQ": (("boolq",), 0),
}
#: Documents of each set, and in how many parts they are scored; MMLU's parts are its subjects.
DOCUMENTS, PARTS = 50, 2
#: `HFLM` runs with each of these on the first part, and with its fastest on all.
BATCH_SIZES = (1, 8, 16)
#: Documents a task in float32.
FEW = 2


class Part(NamedTuple):
    """Documents that are scored in one call: lm-eval's task, the document and its requests, for each of them."""

    documents: list[tuple[Any, Any, list[Instance]]]

    @property
    def requests(self) -> list[Instance]:
        return [request for _, _, requests in self.documents for request in requests]


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a set in bfloat16, and one for agreement in float32."""
    data: dict[str, Any] = {}
    settings = {"model": MODEL, "documents": DOCUMENTS, "parts": PARTS, "batch_sizes": BATCH_SIZES}
    for name, (tasks, shots) in SETS.items():
        params = {"set": name, "tasks": tasks, "shots": shots, **settings}
        data.setdefault("sets", {})[name] = checkpoint.item(params, partial(measure, tasks, shots))
        print(line(name, data["sets"][name]), flush=True)
    data["total"] = total(data["sets"].values())
    exact = {"model": MODEL, "dtype": "float32", "documents": FEW, "tasks": {name: tasks for name, (tasks, _) in SETS.items()}}
    data["float32"] = checkpoint.item(exact, agreement)
    print(table(data), flush=True)
    return data, {**settings, "dtype": "bfloat16", "sets": SETS, "few": FEW, "threads": torch.get_num_threads()}, [0]


def parts(tasks: Sequence[str], shots: int, documents: int, pieces: int) -> list[Part]:
    """`documents` documents spread over `tasks`, each task's in `pieces` parts (one, where there are several tasks)."""
    from sparsity_lib.evaluate.bench_quiet import quiet_lm_eval

    loaded, found = load_tasks(tasks, dict.fromkeys(tasks, shots)), []
    pieces = pieces if len(tasks) == 1 else 1
    for name, task in loaded.items():
        chosen = sampled_documents(name, len(task.eval_docs), documents // len(tasks), seed=0)
        for first in range(pieces):
            with quiet_lm_eval():
                task.build_all_requests(samples=chosen[first::pieces])
            by_document: dict[int, list[Instance]] = {}
            for request in task.instances:
                by_document.setdefault(request.doc_id, []).append(request)
            found.append(Part([(task, requests[0].doc, requests) for requests in by_document.values()]))
    return found


def measure(tasks: Sequence[str], shots: int) -> dict[str, Any]:
    """Both engines on one set in bfloat16, the dtype of the book's benchmarks."""
    model, tokenizer = load_model(MODEL, dtype=torch.bfloat16)
    found = compare(model, tokenizer, parts(tasks, shots, DOCUMENTS, PARTS), BATCH_SIZES, TASKS[tasks[0]].primary)
    whole = tasks if len(tasks) == 1 else [f"mmlu_{subject}" for subject in MMLU_SUBJECTS]
    return {**found, "available": sum(map(_available, whole))}


def _available(name: str) -> int:
    task = TASKS[name]
    configs = benchmark_configs(task.benchmark)
    return configs[task.config or next(iter(configs))][task.evaluated]


def compare(model, tokenizer, scored: Sequence[Part], batch_sizes: Sequence[int], metric: str) -> dict[str, Any]:
    """Seconds and outcomes of `HFLM` at each batch size and of `PrefixLM`, part by part in turn.

    Returns
    -------
    dict
        `hflm` and `prefix`: wall and CPU seconds over all parts, `HFLM` at the `batch_size` that took it the least wall
        seconds on the first. `ratio`, `ratio_cpu`: how many times less `PrefixLM` needs; `ratio_of_parts`: the former by part.
        `largest_difference` of a log-likelihood (nats), the `accuracy` of both by `metric`, and how many documents
        `flipped` between right and wrong. On the first part, by batch size of `HFLM`: `first_part` (seconds), and
        `of_batches`, the outcomes of the best against the others.
    """
    engines = {f"hflm {size}": _engine(model, tokenizer, size) for size in batch_sizes}
    engines["prefix"] = _engine(model, tokenizer)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    answers: dict[str, list[tuple[float, bool]]] = {name: [] for name in engines}
    for engine in engines.values():  # what is done once only, such as choosing the kernels, is not timed
        _score(engine, scored[0].documents[0][2])
    taking_part, best = list(engines), ""
    for turn, part in enumerate(scored):
        for name in taking_part[:: 1 if turn % 2 == 0 else -1]:
            gc.collect()
            found, spent = _score(engines[name], part.requests)
            answers[name] += found
            seconds[name].append(spent)
        if not best:
            best = min(taking_part[:-1], key=lambda name: seconds[name][0]["wall"])
            taking_part = [best, "prefix"]
    sums = {name: {kind: sum(each[kind] for each in seconds[name]) for kind in ("wall", "cpu")} for name in taking_part}
    others = [name for name in engines if name not in taking_part]
    first = len(scored[0].requests)
    return {
        "documents": sum(len(part.documents) for part in scored), "requests": len(answers["prefix"]),
        "by_blocks": engines["prefix"].by_blocks, "batch_size": int(best.split()[1]), "hflm": sums[best],
        "prefix": sums["prefix"], "ratio": sums[best]["wall"] / sums["prefix"]["wall"],
        "ratio_cpu": sums[best]["cpu"] / sums["prefix"]["cpu"],
        "ratio_of_parts": [a["wall"] / b["wall"] for a, b in zip(seconds[best], seconds["prefix"], strict=True)],
        "first_part": {name.split()[1]: seconds[name][0] for name in (best, *others)},
        "of_batches": {name.split()[1]: outcomes(scored[:1], answers[best][:first], answers[name], metric) for name in others},
        **outcomes(scored, answers[best], answers["prefix"], metric),
    }


def _engine(model, tokenizer, batch_size: int | None = None) -> Any:
    """`HFLM` where a batch size is given, else `PrefixLM`."""
    from lm_eval.models.huggingface import HFLM

    from sparsity_lib.evaluate.bench_quiet import quiet_lm_eval
    from sparsity_lib.evaluate.prefix_lm import PrefixLM

    with quiet_lm_eval():
        if batch_size is None:
            return PrefixLM(model, tokenizer)
        return HFLM(model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def _score(engine, requests: list[Instance]) -> tuple[list[tuple[float, bool]], dict[str, float]]:
    from sparsity_lib.evaluate.bench_quiet import quiet_lm_eval

    with quiet_lm_eval():
        wall, cpu = time.perf_counter(), time.process_time()
        found = engine.loglikelihood(requests, disable_tqdm=True)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return found, spent


def outcomes(scored: Sequence[Part], theirs: list, ours: list, metric: str) -> dict[str, Any]:
    """How two lists of answers to the same requests differ; `theirs` is HFLM's."""
    right: dict[str, list[float]] = {"hflm": [], "prefix": []}
    place = 0
    for task, document, requests in (entry for part in scored for entry in part.documents):
        for name, answers in (("hflm", theirs), ("prefix", ours)):
            right[name].append(float(task.process_results(document, answers[place : place + len(requests)])[metric]))
        place += len(requests)
    return {
        "metric": metric, "accuracy": {name: sum(each) / len(each) for name, each in right.items()},
        "flipped": sum(a != b for a, b in zip(*right.values(), strict=True)),
        "largest_difference": max(abs(a - b) for (a, _), (b, _) in zip(theirs, ours, strict=True)),
    }


def agreement() -> dict[str, Any]:
    """Both engines in float32 on a few documents of every set, and how far each is from that in bfloat16."""
    found: dict[str, Any] = {}
    models = {dtype: load_model(MODEL, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name, (tasks, shots) in SETS.items():
        scored = parts(tasks, shots, FEW * len(tasks), 1)
        found[name] = exactness(models, scored, TASKS[tasks[0]].primary)
    return found


def exactness(models: Mapping[torch.dtype, tuple[Any, Any]], scored: Sequence[Part], metric: str) -> dict[str, Any]:
    """The outcomes of both engines in float32, and in `bfloat16` the largest distance of each from `HFLM` in float32."""
    answers: dict[tuple[str, torch.dtype], list] = {}
    for dtype, (model, tokenizer) in models.items():
        for name, engine in (("hflm", _engine(model, tokenizer, 1)), ("prefix", _engine(model, tokenizer))):
            answers[name, dtype] = [answer for part in scored for answer in _score(engine, part.requests)[0]]
    exact = answers["hflm", torch.float32]
    away = {
        name: max(abs(a - b) for (a, _), (b, _) in zip(answers[name, torch.bfloat16], exact, strict=True))
        for name in ("hflm", "prefix")
    }
    return {
        "requests": len(exact), "largest": max(abs(value) for value, _ in exact), "bfloat16": away,
        **outcomes(scored, exact, answers["prefix", torch.float32], metric),
    }


def total(sets: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ratios of the summed seconds: as measured, and as if every set were scored whole at the same seconds a document."""
    def ratio(kind: str, weights: Sequence[float]) -> float:
        theirs, ours = (
            sum(weight * each[engine][kind] for weight, each in zip(weights, sets, strict=True)) for engine in ("hflm", "prefix")
        )
        return theirs / ours

    sets = list(sets)
    ones, whole = [1.0] * len(sets), [each["available"] / each["documents"] for each in sets]
    return {
        "hflm": sum(each["hflm"]["wall"] for each in sets), "prefix": sum(each["prefix"]["wall"] for each in sets),
        "ratio": ratio("wall", ones), "ratio_cpu": ratio("cpu", ones), "ratio_of_whole_sets": ratio("wall", whole),
    }


def line(name: str, found: Mapping[str, Any]) -> str:
    """One set as text."""
    spread = ", ".join(f"{ratio:.2f}" for ratio in found["ratio_of_parts"])
    accuracy = found["accuracy"]
    return (
        f"{name:10} {found['documents']} documents: HFLM {found['hflm']['wall']:6.2f} s (batches of {found['batch_size']}), "
        f"PrefixLM {found['prefix']['wall']:6.2f} s: {found['ratio']:.2f} x ({spread}; CPU {found['ratio_cpu']:.2f} x); "
        f"{found['metric']} {accuracy['hflm']:.2f} and {accuracy['prefix']:.2f}, {found['flipped']} documents differ"
    )


def table(data: Mapping[str, Any]) -> str:
    """All sets as text, the total, and how well the engines agree."""
    whole = data["total"]
    lines = [line(name, found) for name, found in data["sets"].items()]
    lines.append(
        f"together   HFLM {whole['hflm']:.1f} s, PrefixLM {whole['prefix']:.1f} s: {whole['ratio']:.2f} x "
        f"(CPU {whole['ratio_cpu']:.2f} x; weighted by the sets' own sizes {whole['ratio_of_whole_sets']:.2f} x)"
    )
    for name, found in data["float32"].items():
        lines.append(
            f"{name:10} float32: within {found['largest_difference']:.1g} of at most {found['largest']:.0f} nats, "
            f"{found['flipped']} documents differ; bfloat16 is away from that by {found['bfloat16']['hflm']:.2g} (HFLM) "
            f"and {found['bfloat16']['prefix']:.2g} (PrefixLM)"
        )
    return "\n".join(lines)
