"""A whole distillation from one file, on one device or many: `python -m sparsity_lib.cwic RECIPE [OPTIONS]`.

    python -m sparsity_lib.cwic toy
    accelerate launch --num_processes 8 -m sparsity_lib.cwic llama-3.2-1b --data chats.jsonl --out runs/llama-1b

RECIPE is a name of those that come with the library, or a JSON file of the same fields. DATA has a JSON object a line, either
{"messages": [{"role": ..., "content": ...}, ...]} or {"text": ...}; without it, the book's training text is used. The
command again goes on from the last checkpoint.

A device holds 16 bytes a weight, and the teacher. With "shard" in the recipe (FSDP) several devices hold that together, each a
part, and besides it one or two blocks, and whole what is outside of all blocks: embedding and head. "checkpointing" computes
blocks twice instead of keeping their activations. "accumulation" is meant for one device; several share its pieces, so that
each computes as many rows at a time. On the host, every process needs 8 bytes a weight while it starts, and the first one 12
while it writes a checkpoint. `torchrun --nproc-per-node 8 -m sparsity_lib.cwic ...` is the same as `accelerate launch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity_lib.assets.models import load_model
from sparsity_lib.checks import count
from sparsity_lib.cwic.budget import ETA, PRESETS
from sparsity_lib.cwic.config import CWICConfig
from sparsity_lib.cwic.convert import convert
from sparsity_lib.cwic.history import StepRecord
from sparsity_lib.cwic.train import CWICRecipe, CWICTrained, teacher_of, train_cwic
from sparsity_lib.errors import SparsityError, command_line, refuse, unknown
from sparsity_lib.train.packing import chats, pack
from sparsity_lib.train.recipe import TrainRecipe

FIELDS = (
    "about", "model", "preset", "length", "config", "budget", "eta", "mode", "mse", "train", "teacher", "every", "checkpointing",
    "shard")
NEEDED = ("model", "preset", "length", "train")
TEACHERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(path.name.removesuffix(".json") for path in files("sparsity_lib.cwic").joinpath("recipes").iterdir())


def read(recipe: str) -> dict[str, Any]:
    """A recipe by its name or file.

    Raises SparsityError for an unknown name or field, a missing one, or a file that is no JSON object.
    """
    if recipe in names():
        text = files("sparsity_lib.cwic").joinpath("recipes", f"{recipe}.json").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        text = Path(recipe).read_text(encoding="utf-8")
    else:
        raise unknown("recipe", recipe, names())
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SparsityError(f"{recipe} is no JSON: {error}. Fix: see sparsity_lib/cwic/recipes.") from None
    if not isinstance(found, dict):
        raise refuse("recipe", found, "an object")
    for name in found:
        if name not in FIELDS:
            raise unknown("field of a recipe", name, FIELDS)
    for name in NEEDED:
        if name not in found:
            raise SparsityError(f"{recipe} lacks {name!r}. Fix: see sparsity_lib/cwic/recipes.")
    if found["preset"] not in PRESETS:
        raise unknown("preset", found["preset"], PRESETS)
    if found.get("teacher", "float32") not in TEACHERS:
        raise unknown("teacher", found["teacher"], TEACHERS)
    if not isinstance(found.get("shard", False), bool):
        raise refuse("shard", found["shard"], "true or false")
    return found


def built(found: Mapping[str, Any], processes: int = 1) -> tuple[CWICConfig, CWICRecipe]:
    """Configuration and recipe of what `read` gave; raises SparsityError for what they do not allow.

    The pieces that a batch is computed in are shared among `processes`, where they come out even.
    """
    try:
        plain = TrainRecipe(**found["train"])
        pieces = max(1, plain.accumulation // processes)
        if plain.batch % (pieces * processes) == 0:
            plain = dataclasses.replace(plain, accumulation=pieces)
        budget = PRESETS[found["preset"]](plain.steps, **found.get("budget", {}))
    except TypeError as error:
        raise SparsityError(f"The recipe is broken: {error}.") from None
    options = {name: found[name] for name in ("mode", "mse") if name in found}
    recipe = CWICRecipe(plain, budget, eta=found.get("eta", ETA[found["preset"]]), **options)
    return CWICConfig.from_json(found.get("config", {})), recipe


def rows(tokenizer: Any, path: str | None, length: int, needed: int) -> dict[str, Tensor] | Tensor:
    """Packed rows of the user's text, or `needed` rows of the book's.

    Raises SparsityError for a file that is missing, empty, or has a line of another form.
    """
    if path is None:
        from sparsity_lib.assets.texts import token_sequences

        return token_sequences(tokenizer, "training", tokens=needed * length, length=length)
    if not Path(path).is_file():
        raise refuse("data", path, "a file of JSON lines")
    documents: list[list[int]] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                documents.append(_document(tokenizer, line, f"{path}, line {number}"))
    if not documents:
        raise SparsityError(f"{path} is empty. Fix: one JSON object a line.")
    return pack(documents, length)


def _document(tokenizer: Any, line: str, where: str) -> list[int]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise SparsityError(f"{where} is no JSON: {error}. Fix: one JSON object a line.") from None
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        return list(tokenizer(found["text"]).input_ids)
    if isinstance(found, dict) and "messages" in found:
        return chats(tokenizer, [found["messages"]])[0]
    raise SparsityError(f'{where} has neither "messages" nor "text". Fix: {{"text": "..."}}.')


def distilled(found: Mapping[str, Any], data: str | None, out: Path) -> CWICTrained:
    """Run a recipe; the first process writes the model and its tokenizer to OUT/model, checkpoints are in OUT/checkpoints."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config, recipe = built(found, processes)
    length = count("length", found["length"], minimum=2)
    model, tokenizer = load_model(found["model"])
    teacher = teacher_of(model, share=recipe.mode != "all")
    if "teacher" in found and recipe.mode == "all":
        teacher.to(TEACHERS[found["teacher"]])
    if torch.cuda.is_available() and processes == 1:
        model.to("cuda")  # with several processes, the trainer puts each on its own
    convert(model, config)
    if found.get("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    steps, passes = recipe.train.steps * recipe.train.batch, recipe.train.passes
    text = rows(tokenizer, data, length, -(-steps // passes))
    made = train_cwic(
        model, teacher, text, recipe, checkpoints=out / "checkpoints", every=found.get("every", 100), on_step=_say,
        shard=found.get("shard", False))
    model.save_pretrained(out / "model", is_main_process=_first())  # all are needed where weights are split
    if _first():
        tokenizer.save_pretrained(out / "model")
    return made


def _say(record: StepRecord, model: Any) -> None:
    if record.step % 10 == 0:
        print(f"step {record.step}: KL {record.kl:.4f}, {record.ratio:.2f}x of {record.target:.2f}x, "
              f"{record.tokens_per_second:.0f} tokens/s", flush=True)


def _first() -> bool:
    from torch import distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@command_line("the same command goes on from the last checkpoint")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_lib.cwic", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help=f"a JSON file, or one of {', '.join(names())}")
    parser.add_argument("--data", help="JSON lines of messages or text; the book's training text if left out")
    parser.add_argument("--out", type=Path, help="folder of checkpoints and the model (runs/cwic-RECIPE)")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / f"cwic-{Path(options.recipe).stem}"
    made = distilled(read(options.recipe), options.data, out)
    if _first() and made.history:
        print(f"{out / 'model'}: {made.history[-1].ratio:.2f}x, KL {made.history[-1].kl:.4f}, {made.run.seen:,} tokens")
    return 0
