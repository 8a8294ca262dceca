"""Granular models that are kept with the book: a small network with its weights, and SmolLM2's thresholds alone.

    model, tokenizer = load_shipped("smollm2-cwic-3x")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity_lib import project, results
from sparsity_lib.assets.cache import sha256_of
from sparsity_lib.assets.keep import checksums, keep_checkpoint
from sparsity_lib.assets.models import load_model
from sparsity_lib.cwic.export import load_thresholds, save_thresholds
from sparsity_lib.errors import AssetError, unknown


@dataclass(frozen=True)
class Shipped:
    """result: whose manifest says how it came about; base: the dense model; thresholds: whether weights are the base's."""

    result: str
    base: str
    thresholds: bool


SHIPPED = {
    "small-llama-cwic-3x": Shipped("cwic_small", "small-llama", False),
    "small-llama-cwic-6x": Shipped("cwic_small", "small-llama", False),
    "smollm2-cwic-2x": Shipped("cwic_smol", "smollm2-135m-instruct", True),
    "smollm2-cwic-3x": Shipped("cwic_smol", "smollm2-135m-instruct", True),
}
#: SmolLM2's stripes by role. Narrower ones are read at less of the memory's speed; k and v, of 192 outputs, have one stripe.
SMOLLM2_STRIPES = {"q": 128, "o": 128, "gate": 256, "head": 1024}
#: The one file of an artifact of thresholds.
FILE = "thresholds.safetensors"


def folder_of(name: str) -> Path:
    """Where an artifact lies in the book's checkout; raises SparsityError for an unknown name."""
    if name not in SHIPPED:
        raise unknown("shipped granular model", name, SHIPPED)
    return project.root() / "results" / results.MODELS / name


def keep_model(model: nn.Module, tokenizer: Any, name: str) -> dict[str, str]:
    """Write a granular model as a checkpoint with weights in bfloat16, whole or not at all; file -> sha256. Casts `model`."""
    return keep_checkpoint(model, tokenizer, folder_of(name))


def keep_thresholds(model: nn.Module, tokenizer: Any, name: str) -> dict[str, str]:
    """Write a granular model's thresholds and statistics; file -> sha256. The tokenizer is the base's."""
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    save_thresholds(model, folder / FILE)
    return checksums(folder)


def load_shipped(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A kept granular model in evaluation mode, and its tokenizer.

    Raises
    ------
    SparsityError
        For an unknown name, or where the result that made it is not there.
    AssetError
        If a file is missing, damaged, or not the one that was learned.
    """
    shipped, folder = SHIPPED.get(name), folder_of(name)
    fix = f"Fix: git checkout results/models, or make results R={shipped.result}"
    expected = results.load(shipped.result).data.get("files", {}).get(name, {})
    if not expected:
        raise AssetError(f"results/{shipped.result}.json does not list {name}. {fix}.")
    for file, checksum in expected.items():
        path = folder / file
        if not path.is_file() or sha256_of(path) != checksum:
            raise AssetError(f"results/models/{name}/{file} {'is damaged' if path.is_file() else 'is missing'}. {fix}.")
    if not shipped.thresholds:
        return load_model(str(folder), dtype=dtype)
    model, tokenizer = load_model(shipped.base, dtype=dtype)
    load_thresholds(model, folder / FILE)
    return model, tokenizer
