"""What the CWIC experiments share: a run as plain data, its training, and what is measured on the way.

A run ends in an item of its experiment; on the way, the trainer's checkpoints and the milestones measured so far lie in
`results/.partial/cwic-training`, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import project
from sparsity_lib.assets.cache import remove
from sparsity_lib.assets.models import load_model
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.cwic import ETA, PRESETS, Activity, Budget, CWICConfig, CWICRecipe, convert, measure, teacher_of, train_cwic
from sparsity_lib.cwic.history import LOG
from sparsity_lib.cwic.shipped import keep_model, keep_thresholds
from sparsity_lib.errors import Diverged
from sparsity_lib.evaluate.quality import evaluate_other
from sparsity_lib.experiments import common
from sparsity_lib.passes import evaluating
from sparsity_lib.train.recipe import TrainRecipe

#: Milestones of a run: when its target passes these ratios, and its end.
RATIOS = (2, 3, 4, 5, 6)
#: Training text: half of the tokens from each source.
SOURCES = ("boolq-train", "hellaswag-train")
#: Sequences of the evaluation text whose masks are counted.
COUNTED = 8
#: Steps that a point of the stored curves averages.
CURVE = 10


def spec(
    model: str, loss: str = "active", *, steps: int, batch: int, length: int, rate: float, text: Mapping[str, int],
    checkpoint: int = 100, stripe: int | Mapping[str, int] | None, final: float = 6.0, mode: str = "all", seed: int = 0,
    sources: Sequence[str] = SOURCES, every: int = 1, **options: Any,
) -> dict[str, Any]:
    """One run in plain data.

    loss is a preset of `cwic.PRESETS`, checkpoint the steps from one checkpoint to the next, and every n-th token of `text` is
    predicted. Options may hold `config` and `budget` (changes to their defaults), `eta`, `mse`, `rank`, `alpha`, `watch` (keep
    frequencies at the milestones) and `keep` (the artifact's name).
    """
    config = {"stripe": stripe, "uneven": True, **options.pop("config", {})}
    return {
        "model": model, "loss": loss, "final": final, "mode": mode, "seed": seed, "config": config, "sources": list(sources),
        "train": {"steps": steps, "batch": batch, "length": length, "rate": rate, "checkpoint": checkpoint},
        "text": dict(text), "every": every, **options}


def recipe_of(params: Mapping[str, Any]) -> CWICRecipe:
    """The recipe of a run: warm-up over the papers' share of the steps, then a constant rate (active parameters) or one that
    falls to a tenth (FLOPs)."""
    train, loss = params["train"], params["loss"]
    warmup = {"active": 500 / 18_000, "flops": 500 / 7_000}[loss]
    plain = TrainRecipe(
        steps=train["steps"], batch=train["batch"], learning_rate=train["rate"], warmup=round(warmup * train["steps"]),
        floor={"active": 1.0, "flops": 0.1}[loss], weight_decay=0.01, betas=(0.9, 0.95), seed=params["seed"])
    budget = PRESETS[loss](train["steps"], final=params["final"], **params.get("budget", {}))
    options = {name: params[name] for name in ("mse", "rank", "alpha") if name in params}
    return CWICRecipe(plain, budget, mode=params["mode"], eta=params.get("eta", ETA[loss]), **options)


def milestones(budget: Budget, steps: int) -> dict[int, str]:
    """Step (counted from 0) -> what it is: the first whose target is a ratio of `RATIOS` and the margin, and the last."""
    found = {}
    for ratio in RATIOS:
        wanted = ratio + budget.margin - 1e-9
        first = next((step for step in range(steps) if budget.target(step) >= wanted), None)
        if first is not None and first not in found:
            found[first] = f"{ratio}x"
    return {**found, steps - 1: "end"}


def training_text(tokenizer: Any, sources: Sequence[str], tokens: int, length: int) -> Tensor:
    """`tokens` of text as [sequences, length], as many from each source; the trainer mixes them."""
    each = tokens // len(sources)
    return torch.cat([token_sequences(tokenizer, "training", source=s, tokens=each, length=length) for s in sources])


def run_of(params: Mapping[str, Any], report: Callable[..., None] = print) -> dict[str, Any]:
    """Train one run to its end, or take up where it was killed; what it measured, in plain data.

    A loss that is not finite ends it early: `stopped` then says at which step, and the milestones are those before it.
    """
    folder = work_folder(params)
    model, tokenizer = load_model(params["model"])
    teacher = teacher_of(model, share=params["mode"] != "all")
    registry = convert(model, CWICConfig(**params["config"]))
    recipe, train = recipe_of(params), params["train"]
    rows = training_text(tokenizer, params["sources"], train["steps"] * train["batch"] * train["length"], train["length"])
    ids = common.evaluation_ids(tokenizer, **params["text"])
    points = _Points(folder, teacher, ids, params, milestones(recipe.budget, train["steps"]), report)
    history, stopped, seconds = _train(model, teacher, rows, recipe, folder, train["checkpoint"], points)
    found = {
        "milestones": points.found(), "curve": curve(history), "stopped": stopped, "tokens": sum(r["tokens"] for r in history),
        "seconds": seconds, "dense": registry.dense, "ids": common.fingerprint(ids)}
    if "keep" in params and stopped is None:
        keep = keep_thresholds if params["mode"] == "thresholds" else keep_model
        found["files"] = keep(model, tokenizer, params["keep"])
    remove(folder)
    return found


def _train(model, teacher, rows, recipe, folder, every, points) -> tuple[list[dict[str, Any]], int | None, float]:
    """The records of all steps, the step that was not finite, and the seconds."""
    try:
        made = train_cwic(model, teacher, rows, recipe, checkpoints=folder, every=every, on_step=points)
    except Diverged:
        lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()] if (folder / LOG).exists() else []
        return lines, len(lines), 0.0
    return [vars(record) for record in made.history], None, made.run.seconds


def work_folder(params: Mapping[str, Any]) -> Path:
    """Where a run keeps what it has until it is finished."""
    key = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:16]
    return project.root() / "results" / ".partial" / "cwic-training" / key


class _Points:
    """Measures the model at the milestones and keeps what it found beside the checkpoints."""

    def __init__(self, folder: Path, teacher: nn.Module, ids: Tensor, params: Mapping[str, Any], at: dict[int, str],
                 report: Callable[..., None]) -> None:
        self.path, self.teacher, self.ids = folder / "milestones.json", teacher, ids
        self.params, self.at, self.report = params, at, report

    def found(self) -> list[dict[str, Any]]:
        """In the order of steps."""
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        return [stored[key] for key in sorted(stored, key=int)]

    def __call__(self, record, model: nn.Module) -> None:
        if record.step not in self.at:
            return
        point = {"step": record.step, "at": self.at[record.step], "target": record.target, "batch_ratio": record.ratio,
                 **examine(model, self.teacher, self.ids, self.params["every"], watch=self.params.get("watch", False))}
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        project.write_atomic(self.path, json.dumps({**stored, str(record.step): point}))
        quality = point["quality"]
        kl = sum(quality["kl"]) / sum(quality["tokens"])
        self.report(f"{self.params['loss']} step {record.step}: {point['ratio']:.2f}x, KL {kl:.3f}", flush=True)


def examine(model: nn.Module, teacher: nn.Module, ids: Tensor, every: int = 1, *, watch: bool = False) -> dict[str, Any]:
    """Quality on `ids`, the ratio and densities of the masks there, and the head's stripes; with `watch`, all frequencies."""
    with evaluating(model):
        quality = evaluate_other(teacher, model, ids, every=every, batch_size=4)
        activity = measure(model, ids[:COUNTED], batch_size=4)
    return {"quality": rounded(quality.to_json()), "ratio": activity.ratio(), "density": densities(activity), **head_of(activity),
            **({"channels": channels(activity)} if watch else {})}


def rounded(quality: dict[str, Any]) -> dict[str, Any]:
    """Sums in nats to four places, which is less than any interval shows; infinities and NaN, which JSON lacks, as 1e9."""
    return {name: [round(v, 4) if math.isfinite(v) else 1e9 for v in values] if name != "tokens" else list(values)
            for name, values in quality.items()}


def densities(activity: Activity) -> dict[str, list[float]]:
    """Role -> share of the weights read in each block, in order."""
    return {role: [round(by[block], 5) for block in sorted(by)] for role, by in activity.density().items()}


def head_of(activity: Activity) -> dict[str, Any]:
    """How often the head's stripes are read, each the mean over its inputs, along the vocabulary."""
    names = [name for name, block, role, _ in activity.layers if role == "head"]
    return {"head": [round(v, 5) for v in activity.frequency[names[0]].mean(1).tolist()]} if names else {}


def channels(activity: Activity) -> dict[str, list[list[float]]]:
    """Role -> block -> how often each input passes, the mean over stripes, [block][input]; roles whose input is a stream."""
    found: dict[str, list[list[float]]] = {}
    for name, _, role, _ in activity.layers:
        if role in ("q", "k", "v", "o", "gate"):
            found.setdefault(role, []).append([round(v, 3) for v in activity.frequency[name].mean(0).tolist()])
    return found


def curve(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Means of `CURVE` steps: target, the batch's ratio, KL (nats a token), the head's own ratio."""
    pieces = [history[i : i + CURVE] for i in range(0, len(history), CURVE)]

    def mean(name: str) -> list[float]:
        return [round(sum(r[name] or 0.0 for r in piece) / len(piece), 5) for piece in pieces]

    return {"step": [piece[-1]["step"] for piece in pieces],
            **{name: mean(name) for name in ("target", "ratio", "kl", "head_ratio", "loss")}}
