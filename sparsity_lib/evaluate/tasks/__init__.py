"""The benchmarks as lm-eval tasks over local data.

Prompts, answers, metrics and few-shot rules are lm-eval's own: each task *includes* the stock YAML of the installed
lm-eval and replaces only where the documents come from. That needs absolute paths, so the YAML folder is written at run
time. It also serves lm-eval's command line::

    python -c "from sparsity_lib.evaluate.tasks import write_tasks; write_tasks('tasks')"
    lm-eval run --model hf --model_args pretrained=FOLDER --include_path tasks --tasks arc_easy,mmlu_anatomy
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from sparsity_lib import project
from sparsity_lib.errors import SparsityError

#: The function that lm-eval calls for the documents of a task.
LOADER = "sparsity_lib.evaluate.tasks.loaders.load"


@dataclass(frozen=True)
class BenchmarkTask:
    """One lm-eval task with local documents.

    `stock` is lm-eval's YAML, relative to its tasks folder; `benchmark` and `config` name the local data; `evaluated` is
    the split scored and `stock_split` the one that lm-eval would score; `extra_splits` serve few-shot examples.
    `primary` is the metric that counts where nothing else is said: acc_norm (log-likelihood per byte of the answer) where
    lm-eval has it, else acc; exact_match where an answer is written. `filter` names lm-eval's way to find it in the text.
    """

    name: str
    stock: str
    benchmark: str
    config: str | None
    evaluated: str
    stock_split: str
    primary: str = "acc_norm"
    extra_splits: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    filter: str = "none"

    @property
    def writes(self) -> bool:
        """Whether the model writes the answer, where elsewhere it ranks given ones."""
        return self.primary == "exact_match"

    @property
    def splits(self) -> tuple[str, ...]:
        """All local splits that the task reads."""
        return (self.evaluated, *self.extra_splits)


MMLU_SUBJECTS = tuple(
    """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions""".split()
)

_ACC, _EXACT = ("acc",), ("exact_match",)
TASKS: dict[str, BenchmarkTask] = {
    task.name: task
    for task in (
        BenchmarkTask(
            "arc_easy", "arc/arc_easy.yaml", "ai2_arc", "ARC-Easy", "test", "test", extra_splits=("validation",)
        ),
        BenchmarkTask(
            "arc_challenge", "arc/arc_challenge.yaml", "ai2_arc", "ARC-Challenge", "test", "test",
            extra_splits=("validation",),
        ),
        BenchmarkTask("hellaswag", "hellaswag/hellaswag.yaml", "hellaswag", None, "validation", "validation"),
        BenchmarkTask("piqa", "piqa/piqa.yaml", "piqa", None, "validation", "validation"),
        BenchmarkTask(
            "winogrande", "winogrande/default.yaml", "winogrande", None, "validation", "validation", "acc", metrics=_ACC
        ),
        BenchmarkTask("openbookqa", "openbookqa/openbookqa.yaml", "openbookqa", None, "validation", "test"),
        BenchmarkTask(
            "boolq", "super_glue/boolq/default.yaml", "boolq", None, "validation", "validation", "acc", metrics=_ACC
        ),
        BenchmarkTask("sciq", "sciq/sciq.yaml", "sciq", None, "validation", "test"),
        BenchmarkTask(
            "lambada_openai", "lambada/lambada_openai.yaml", "lambada", None, "test", "test", "acc",
            metrics=("acc", "perplexity"),
        ),
        BenchmarkTask(
            "triviaqa", "triviaqa/default.yaml", "trivia_qa", None, "validation", "validation", "exact_match",
            metrics=_EXACT, filter="remove_whitespace",
        ),
        BenchmarkTask(
            "gsm8k", "gsm8k/gsm8k.yaml", "gsm8k", "main", "test", "test", "exact_match", metrics=_EXACT,
            filter="flexible-extract",
        ),
        *(
            BenchmarkTask(
                f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml", "mmlu", subject, "test", "test", "acc",
                extra_splits=("dev",), metrics=_ACC,
            )
            for subject in MMLU_SUBJECTS
        ),
    )
}


def stock_folder() -> Path:
    """The tasks folder of the installed lm-eval.

    Raises
    ------
    SparsityError
        If lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SparsityError("lm-eval is not installed. Fix: pip install lm-eval.")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def task_yaml(task: BenchmarkTask) -> str:
    """The YAML of a task: the stock one by inclusion, with the documents and the splits that exist here."""
    split_keys = {"test": "test_split", "validation": "validation_split"}
    lines = [
        f"task: {task.name}",
        f"include: {_quoted(stock_folder() / task.stock)}",
        f"custom_dataset: !function {LOADER}",
        "dataset_kwargs:",
        f"  benchmark: {task.benchmark}",
        f"  config: {task.config or 'null'}",
        f"  splits: [{', '.join(task.splits)}]",
        "training_split: null",
        *(f"{key}: {split if split in task.splits else 'null'}" for split, key in split_keys.items()),
    ]
    if task.splits == ("test",):  # few-shot examples then come from there: naming the split makes lm-eval leave out the
        lines.append("fewshot_split: test")  # document that is being asked
    return "\n".join(lines) + "\n"


def write_tasks(folder: str | Path, names: tuple[str, ...] | None = None) -> Path:
    """Write one YAML file a task into `folder` (made if missing), for lm-eval's `include_path`; returns the folder.

    Raises SparsityError where it cannot be written.
    """
    folder = Path(folder)
    for name in names or tuple(TASKS):
        project.write_atomic(folder / f"{name}.yaml", task_yaml(TASKS[name]))
    return folder


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
