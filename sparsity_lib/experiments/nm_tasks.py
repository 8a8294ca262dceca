"""Tasks under N:M pruning of activations and of weights: seven that rank answers, and three in which the model writes."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.evaluate.benchmarks import BenchmarkResult, run_benchmarks
from sparsity_lib.experiments import common
from sparsity_lib.experiments.nm_common import DTYPE, PATTERNS, REPAIRS, UNSTRUCTURED, bench_for, learned, point
from sparsity_lib.experiments.scap_grid import TEXT

RANKED = "scap7"
#: Task -> documents, examples in the prompt.
WRITTEN, ANSWERED = {"lambada_openai": (500, 0)}, {"triviaqa": (200, 5)}
#: An answer of TriviaQA is a few words; a broken model would go on for ever.
ENOUGH = 32
#: Tried on the dense model, and on the others where that gets at least `LEAST` right: what it cannot do, pruning cannot break.
HARD, LEAST = {"gsm8k": (48, 5)}, 0.1
LIMIT = 100
KINDS = ("ranked", "written", "hard")
#: Points at which the model writes LAMBADA's last word, and those at which it answers questions as well.
WRITING = (None, *(point(pattern) for pattern in ("2:4", "8:16", UNSTRUCTURED)),
           *(point(pattern, on="weights", score="wanda") for pattern in ("2:4", "8:16", UNSTRUCTURED)))
ANSWERING = (None, point("8:16"), point("8:16", on="weights", score="wanda"))
#: What may be added to plain |x| at 8:16: another score, one repair, and the pair that the study favours.
ADDED = (*({"score": score} for score in ("clact", "amber", "wina", "gradient")),
         *({"repair": [repair]} for repair in ("var", "ls", "low_rank")), {"transform": "dpts", "repair": ["var"]})
POINTS: tuple[dict[str, Any] | None, ...] = (
    None, *(point(pattern) for pattern in (*PATTERNS, UNSTRUCTURED)), *(point("8:16", **options) for options in ADDED),
    *(point(pattern, on="weights", score="wanda") for pattern in ("2:4", "8:16", UNSTRUCTURED)),
    *(point(pattern, on="weights", score="magnitude") for pattern in ("2:4", "8:16", UNSTRUCTURED)),
)


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, point and kind of task; None is the dense model, whose score decides who is asked what is hard."""
    asked = [(name, i, kind) for name in common.MODELS for i, each in enumerate(POINTS) for kind, whether in (
        ("ranked", True), ("written", each in WRITING), ("hard", each is None)) if whether]
    found = _computed(checkpoint, asked)
    able = [name for name in common.MODELS if score(found[name, POINTS.index(None), "hard"], "gsm8k") >= LEAST]
    found |= _computed(checkpoint, [(name, i, "hard") for name in able for i, each in enumerate(POINTS) if each in WRITING[1:]])
    data = {name: [{"point": each, **{kind: found[name, i, kind] for kind in KINDS if (name, i, kind) in found}}
                   for i, each in enumerate(POINTS)] for name in common.MODELS}
    return data, {"points": POINTS, "ranked": RANKED, "limit": LIMIT, "written": {**WRITTEN, **ANSWERED}, "enough": ENOUGH,
                  "hard": HARD, "least": LEAST, "dtype": DTYPE, "calibration": common.CALIBRATION, "repairs": REPAIRS}, [0]


def score(result: dict[str, Any], task: str) -> float:
    """A stored result's score."""
    return BenchmarkResult.from_dict(result[task]).score(task).mean


def _computed(checkpoint, asked: list[tuple[str, int, str]]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Values by model, place of a point and kind of task."""
    wanted = [_params(*each) for each in asked]
    return dict(zip(asked, checkpoint.items([(params, partial(_score, params)) for params in wanted]), strict=True))


def _params(name: str, place: int, kind: str) -> dict[str, Any]:
    each = POINTS[place]
    tasks = {"ranked": {RANKED: (LIMIT, 0)}, "written": {**WRITTEN, **(ANSWERED if each in ANSWERING else {})}, "hard": HARD}
    return {"model": name, "point": each, "tasks": tasks[kind], "dtype": DTYPE, "calibration": common.CALIBRATION,
            **({"max_new_tokens": ENOUGH} if kind == "written" else {}),
            **({"repairs": REPAIRS} if each is not None and learned(each) else {})}


def _score(params: dict) -> dict[str, Any]:
    bench, each = bench_for(params["model"], TEXT), params["point"]

    def all_tasks() -> dict[str, Any]:
        return {task: run_benchmarks(bench.model, bench.tokenizer, task, limit=limit, num_fewshot=shots or None,
                                     max_new_tokens=params.get("max_new_tokens")).to_dict()
                for task, (limit, shots) in params["tasks"].items()}

    if each is None:
        return all_tasks()
    (change,) = bench.changes([each])
    with bench.within(change):
        return all_tasks()
