"""Granular models as files: whole Hugging Face checkpoints, or the thresholds alone for a model that everybody has.

    model.save_pretrained(folder)                    # AutoModelForCausalLM.from_pretrained(folder) loads it back
    save_thresholds(model, "cwic.safetensors")       # small; weights must be the dense model's own
    load_thresholds(dense_model, "cwic.safetensors")

safetensors and JSON only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparsity_lib import sealed
from sparsity_lib.cwic.config import CWICConfig
from sparsity_lib.cwic.convert import Registry, convert, registry_of
from sparsity_lib.errors import SparsityError
from sparsity_lib.train.data import fingerprint

FORMAT = "cwic-thresholds-2"


def restore(model: nn.Module, data: dict[str, Any]) -> nn.Module:
    """Put granular layers into a model that a checkpoint is about to fill; `data` is what config.json says of them."""
    convert(model, CWICConfig.from_json(data.get("config")))
    return model


def identity(model: nn.Module, registry: Registry) -> str:
    """Checksum of each matrix's first row in bfloat16: tells models apart, whatever precision they are loaded in."""
    names = [linear.name for linear in registry.sites.linears] + ([registry.head] if registry.head else [])
    weights = {name: model.get_submodule(name).weight for name in names}
    rows = {f"{name}:{list(w.shape)}": w[0].detach().to(torch.bfloat16) for name, w in weights.items()}
    return fingerprint(rows)


def save_thresholds(model: nn.Module, path: str | os.PathLike) -> Path:
    """Write thresholds and statistics of a granular model, without its weights; whole or not at all.

    Raises SparsityError if it cannot be written, or the model is not granular.
    """
    registry, path = registry_of(model), Path(path)
    meta = {"format": FORMAT, "config": json.dumps(registry.config.to_json()), "model": identity(model, registry)}
    try:
        sealed.write(path, _tensors(registry), meta)
    except (OSError, SafetensorError) as error:
        raise SparsityError(f"Thresholds could not be written to {path}: {error}. Fix: choose another folder.") from None
    return path


def load_thresholds(model: nn.Module, path: str | os.PathLike) -> Registry:
    """Make a dense model granular, in place, with thresholds that `save_thresholds` wrote.

    Raises
    ------
    SparsityError
        If the file is missing, damaged (by its checksum) or of another kind, or was learned on other weights.
    """
    try:
        tensors, meta = sealed.read(path, FORMAT)
    except ValueError as error:
        raise SparsityError(f"{path} holds no readable thresholds: {error}. Fix: save_thresholds(model, path).") from None
    try:
        config = CWICConfig.from_json(json.loads(meta.get("config", "")))
    except (ValueError, RecursionError) as error:
        raise SparsityError(f"{path} has broken metadata: {error}. Fix: save them again.") from None
    was = dict(model.named_modules(remove_duplicate=False))
    registry = convert(model, config)
    own = _tensors(registry)
    fits = {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in tensors.items()}
    if not fits or identity(model, registry) != meta.get("model"):
        _undo(model, registry, was)
        raise SparsityError(f"The thresholds in {path} were learned on another model. Fix: load that model, or train anew.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return registry


def _tensors(registry: Registry) -> dict[str, Tensor]:
    """theta, mean, std and batches of each layer, as they are."""
    kept = {name: layer.sparsity.state_dict(keep_vars=True) for name, layer in registry.layers.items()}
    return {f"{name}.{key}": tensor for name, inside in kept.items() for key, tensor in inside.items()}


def _undo(model: nn.Module, registry: Registry, was: dict[str, nn.Module]) -> None:
    """Put back the modules that `convert` replaced."""
    from sparsity_lib import hf
    from sparsity_lib.accounting import COUNTER

    for name in registry.layers:
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, was[name])
    del model.__dict__["_cwic"], model.__dict__[COUNTER]
    hf.unmark(model)
