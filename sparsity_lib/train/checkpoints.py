"""Checkpoints of a training run: folders `step-N` with safetensors and JSON, each visible whole or not at all.

A checkpoint holds what training changes (trained parameters, buffers, AdamW's moments), the losses so far, and what
the run must agree with to go on: the recipe, the data, the frozen weights. It needs no state of random generators,
because those are seeded anew at every step, from the recipe's seed and the step's number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsity_lib import project
from sparsity_lib.assets.cache import partial, publish, remove, sha256_of
from sparsity_lib.errors import SparsityError

FORMAT = "training-2"
#: Checkpoints kept: the last, and one from before, in case that the last was already on the way to diverging.
KEEP = 2
_NAME = re.compile(r"step-(\d{8})")
_FILES = ("state", "moments")


class Saved(NamedTuple):
    """A checkpoint read back. state: name -> tensor; moments: "PARAMETER:MOMENT" -> tensor."""

    path: Path
    step: int
    about: dict[str, Any]
    state: dict[str, Tensor]
    moments: dict[str, Tensor]


def steps_in(folder: Path) -> list[int]:
    """Steps that the folder has checkpoints of, in order."""
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in matches if match)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, about: Mapping[str, Any], state: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> Path:
    """Write the checkpoint after `step` updates, then remove all but the last `KEEP`.

    Raises SparsityError where the folder cannot be written; earlier checkpoints stay.
    """
    path = path_of(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = partial(path)
        try:
            temporary.mkdir()
            for name, tensors in zip(_FILES, (state, moments), strict=True):
                plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(plain, temporary / f"{name}.safetensors", metadata={"format": FORMAT})
            sums = {f"{name}.safetensors": sha256_of(temporary / f"{name}.safetensors") for name in _FILES}
            about = {"format": FORMAT, "step": step, **about, "sha256": sums}
            about = json.loads(json.dumps(about, allow_nan=False))  # as it will be read
            about["sealed"] = _seal(about)
            (temporary / "training.json").write_text(json.dumps(about, allow_nan=False), encoding="utf-8")
            publish(temporary, path)
        finally:
            remove(temporary)
        for old in steps_in(folder)[:-KEEP]:
            remove(path_of(folder, old))
    except (OSError, SafetensorError) as error:
        raise SparsityError(
            f"The checkpoint {path} could not be written: {error}. Fix: free space or choose another folder."
        ) from error
    return path


def latest(folder: Path) -> Saved | None:
    """The last checkpoint of a folder, or None where there is none.

    Raises SparsityError if it is damaged or none of ours.
    """
    steps = steps_in(folder)
    if not steps:
        return None
    path = path_of(folder, steps[-1])
    try:
        about = json.loads((path / "training.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT or about.get("step") != steps[-1]:
            raise ValueError(f"format {about.get('format')!r}, step {about.get('step')!r}")
        if about.pop("sealed", None) != _seal(about):
            raise ValueError("training.json is not what was written")
        for file, expected in about.pop("sha256").items():
            if sha256_of(path / file) != expected:
                raise ValueError(f"{file} is not what was written")
        state, moments = (load_file(path / f"{name}.safetensors") for name in _FILES)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise SparsityError(f"The checkpoint {path} is damaged: {error}. Fix: delete it; the one before is used then.") from None
    return Saved(path, steps[-1], about, state, moments)


def alone(folder: Path) -> AbstractContextManager[None]:
    """Hold the folder against other runs; raises SparsityError where one is training into it."""
    folder = folder.absolute()
    return project.only_one(folder.parent / f".{folder.name}.lock", f"the training run in {folder}")


def _seal(about: Mapping[str, Any]) -> str:
    """Checksum of training.json, less itself."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def check_same(saved: Saved, expected: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Raise SparsityError, naming the first difference, if a checkpoint belongs to another run."""
    fix = f"Fix: train with what it was made with, or into another folder than {saved.path.parent}"
    for name, value in expected.items():
        if saved.about.get(name) != value:
            old, new = saved.about.get(name), value
            if isinstance(value, Mapping) and isinstance(old, Mapping):
                name, old, new = next((f"{name}.{k}", old.get(k), v) for k, v in value.items() if old.get(k) != v)
            raise SparsityError(f"{saved.path} is of another run: its {name} is {old!r}, not {new!r}. {fix}.")
    found = {name: tensor.shape for name, tensor in saved.state.items()}
    if found != dict(shapes):
        odd = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
        raise SparsityError(f"{saved.path} is of another module: {odd} differs. {fix}.")
