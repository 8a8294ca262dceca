"""Passes over calibration text: a `Text` runs the whole model over all of it, once a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.errors import SparsityError
from sparsity_lib.progress import track
from sparsity_lib.sites import Site

Batch = Mapping[str, Any]


class Text:
    """Calibration text cut into batches, and the model that reads it."""

    #: Whether what passes the sites is what a pass is for, and not on its way to somewhere else.
    watching = True

    def __init__(self, model: nn.Module, stream: Sequence[Tensor | Batch]) -> None:
        self.model, self.stream = model, stream

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def run(self, needs_grad: bool = False, desc: str = "calibrating") -> None:
        """One pass; with `needs_grad`, forward and backward of the loss with gradients for activations only."""
        with evaluating(self.model):
            if needs_grad and isinstance(self.stream[0], Tensor):
                lm.check_head(self.model)
            for batch in track(self.stream, desc=desc, unit="batch"):
                if needs_grad:
                    run_backward(self.model, batch)
                else:
                    run_forward(self.model, batch)

    def reached(self, site: Site) -> None:
        """Called after a watched site has seen its activations."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: statistics of dropout are not wanted."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def run_forward(model: nn.Module, batch: Tensor | Batch) -> None:
    """The blocks of a causal language model on token ids, or any model on its keyword inputs."""
    forward(model, batch)


def forward(model: nn.Module, batch: Tensor | Batch) -> None:
    """`run_forward` with gradients, for whatever asks for them."""
    if isinstance(batch, Tensor):
        lm.show_head(model, lm.hidden_states(model, batch.to(_device(model))))
    else:
        model(**_moved(batch, _device(model)))


def run_backward(model: nn.Module, batch: Tensor | Batch) -> None:
    """Forward and backward of the loss with gradients for activations only.

    Parameters stay frozen: just the embeddings' output asks for gradients, so no weight gradient is made.
    """
    entry = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            if isinstance(batch, Tensor):
                lm.backward_next_token_loss(model, batch.to(_device(model)))
                return
            loss = getattr(model(**_moved(batch, _device(model))), "loss", None)
            if loss is None:
                raise SparsityError("A saliency needs a loss, and the model returned none. Fix: put labels into the batches.")
            loss.backward()
    finally:
        entry.remove()
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _moved(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
