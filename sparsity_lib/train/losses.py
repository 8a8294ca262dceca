"""Losses that the trainer takes: called with the module, one batch and the step's number, they return a scalar."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsity_lib.errors import SparsityError

#: (module, batch, step) -> mean loss over the batch, a scalar that gradients flow from.
Loss = Callable[[nn.Module, "Tensor | Mapping[str, Tensor]", int], Tensor]


def next_token(model: nn.Module, ids: Tensor, step: int = 0) -> Tensor:
    """Mean cross-entropy of each token given those before it, nats; a mixture of experts adds its balancing loss.

    `model` is a causal language model of transformers, `ids` [sequences, tokens].
    """
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def labelled(model: nn.Module, batch: Mapping[str, Tensor], step: int = 0) -> Tensor:
    """The loss that a model of transformers returns for keyword inputs with labels."""
    loss = model(**batch).loss
    if loss is None:
        raise SparsityError("The model returned no loss. Fix: put labels into the data.")
    return loss


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, gradient: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.tensor(value, dtype=torch.float64, device=hidden.device)

    @staticmethod
    def backward(ctx, outer: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None


def with_gradient(hidden: Tensor, gradient: Tensor, value: float) -> Tensor:
    """A scalar of `value` whose gradient with respect to `hidden` is `gradient`, [..., width] both.

    For losses computed piece by piece, as those of wide heads are (`lm.chunks`), where the graph of all pieces
    would not fit.
    """
    return _Known.apply(hidden, gradient, value)
