"""Groups of benchmarks by name, with the metric of each member that counts.

Averages over unlike tasks depend on the members and on the metric (acc or acc_norm), so both are part of a group.

Which split is scored: as in lm-eval for all but two. ARC, MMLU and LAMBADA: test. HellaSwag, PIQA, WinoGrande and BoolQ:
validation, as their test labels are not public. OpenBookQA and SciQ: *validation*, where lm-eval scores the test split,
which the embedded data lack: those two scores are not a leaderboard's, but they are the same for all models compared here.
LAMBADA's local passages have lost their line breaks (see :mod:`sparsity_lib.assets.benchmarks`). In TriviaQA and GSM8K the
model writes its answer; their few-shot examples come from the split that is scored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsity_lib.errors import refuse, unknown
from sparsity_lib.evaluate.tasks import MMLU_SUBJECTS, TASKS


@dataclass(frozen=True)
class Group:
    """A named average.

    `members` are (task or group, metric). `weight` is "tasks" (every member counts the same) or "documents" (every
    document counts the same). `source` says where members and metrics come from.
    """

    name: str
    members: tuple[tuple[str, str], ...]
    source: str
    weight: str = "tasks"


def _primary(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, TASKS[name].primary if name in TASKS else "acc") for name in names)


def _acc(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "acc") for name in names)


GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        Group(
            "avg5", _primary("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
            "CLAWS reports an 'Avg5' without naming its members: this book assumes five tasks that are usual for pruned "
            "models, with acc_norm where lm-eval has it.",
        ),
        Group(
            "scap7", _acc("winogrande", "piqa", "sciq", "hellaswag", "boolq", "arc_easy", "arc_challenge"),
            "SCAP, appendix D (footnote 2), after CATS. The metric is not named; its dense scores (HellaSwag 61.3 for "
            "Mistral-7B) are those of acc.",
        ),
        Group(
            "cwic7", _primary("mmlu", "winogrande", "arc_challenge", "hellaswag", "arc_easy", "openbookqa", "piqa"),
            "CWIC (active parameters), tables 1 and 3: acc_norm; MMLU and WinoGrande have acc only.",
        ),
        Group(
            "cwic6", _primary("winogrande", "arc_challenge", "hellaswag", "arc_easy", "openbookqa", "piqa"),
            "The same without MMLU, on which models of this book's size guess.",
        ),
        Group(
            "cwic7-flops", _acc("mmlu", "arc_challenge", "arc_easy", "hellaswag", "winogrande", "boolq", "sciq"),
            "CWIC (FLOPs), table 1. The metric is not named; its dense HellaSwag (41.1 for Llama-3.2-1B) is of the size of "
            "acc.",
        ),
        Group(
            "book9",
            (*_acc("winogrande", "piqa", "sciq", "hellaswag", "boolq", "arc_easy", "arc_challenge"),
             *_primary("openbookqa", "mmlu")),
            "This book's, for its comparison: SCAP's seven, OpenBookQA and MMLU, every task with the same weight.",
        ),
        Group(
            "generation", _primary("lambada_openai", "triviaqa", "gsm8k"),
            "This book's: a word, a name, a calculation that the model has to write itself (for LAMBADA, lm-eval asks whether "
            "greedy decoding would).",
        ),
        Group(
            "mmlu", _acc(*(f"mmlu_{subject}" for subject in MMLU_SUBJECTS)),
            "All 57 subjects. As in lm-eval every document scored counts the same, so that under a limit per subject every "
            "subject does.",
            weight="documents",
        ),
    )
}


def resolve(names: str | Iterable[str]) -> tuple[str, ...]:
    """The tasks behind task and group names, each once, in order of first mention.

    Raises
    ------
    SparsityError
        For an unknown name (with the nearest known one), or none at all.
    """
    listed = [names] if isinstance(names, str) else list(names)
    if not listed:
        raise refuse("tasks", listed, "at least one task or group", "pass 'avg5'")
    found: dict[str, None] = {}
    for name in listed:
        if name in TASKS:
            found[name] = None
        elif name in GROUPS:
            found.update(dict.fromkeys(resolve(member for member, _ in GROUPS[name].members)))
        else:
            subjects = [task for task in TASKS if task.startswith("mmlu_")]
            known = [*GROUPS, *(TASKS if str(name).startswith("mmlu_") else set(TASKS) - set(subjects))]
            raise unknown("task", name, known)
    return tuple(found)


def weighted_members(
    name: str, documents: dict[str, int], metric: str | None = None
) -> list[tuple[str, str, float]]:
    """(task, metric, weight) behind a task or group; weights add to 1.

    `documents`: number of documents scored for each task at hand. `metric` overrides that of a single task.

    Raises
    ------
    SparsityError
        If the name is unknown, or a member was not run.
    """
    if name in TASKS:
        if name not in documents:
            raise refuse("task", name, f"a task that was run ({', '.join(sorted(documents))})", "run it first")
        chosen = metric or TASKS[name].primary
        if chosen not in TASKS[name].metrics:
            raise unknown(f"metric of {name}", chosen, TASKS[name].metrics)
        return [(name, chosen, 1.0)]
    if name not in GROUPS:
        raise unknown("task", name, [*GROUPS, *documents])
    group = GROUPS[name]
    parts = [weighted_members(member, documents, group_metric) for member, group_metric in _own_metric(group)]
    sizes = [sum(documents[task] for task, _, _ in part) for part in parts]
    weights = [size / sum(sizes) for size in sizes] if group.weight == "documents" else [1 / len(parts)] * len(parts)
    return [(task, of, weight * own) for part, weight in zip(parts, weights, strict=True) for task, of, own in part]


def _own_metric(group: Group) -> list[tuple[str, str | None]]:
    return [(member, metric if member in TASKS else None) for member, metric in group.members]
