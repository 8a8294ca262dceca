"""What the rest of the library knows of blocks whose weights stay on disk (`streamed`): that they must be held to be used."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from sparsity_lib.errors import SparsityError

#: Where a model keeps its source of weights, and each of its blocks what it stands for; no attribute of others.
STORED = "_sparsity_stored"


def held(block: nn.Module) -> AbstractContextManager:
    """A context inside which the weights of a block are in memory; those of an ordinary model's are anyway."""
    stored = block.__dict__.get(STORED)
    return nullcontext() if stored is None else stored.held()


def is_streamed(model: nn.Module) -> bool:
    """Whether the model's blocks stay on disk."""
    return STORED in model.__dict__


def refuse_streamed(model: nn.Module, what: str) -> None:
    """Raise SparsityError where `what` (it opens the message) was asked of a model whose blocks stay on disk."""
    if is_streamed(model):
        raise SparsityError(f"{what} needs all weights, and this model's blocks stay on disk. Fix: load_model without stream.")


def device_of(block: nn.Module) -> torch.device:
    """Where a block's weights are, or will be while they are held."""
    stored = block.__dict__.get(STORED)
    return next(block.parameters()).device if stored is None else stored.weights.device
