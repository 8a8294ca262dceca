"""Distillation from the dense model: half forward, half reverse KL, with logits of few tokens in memory at a time.

    L = 1/2 KL(teacher || student) + 1/2 KL(student || teacher), nats, mean over tokens                 (section 3.8)

The papers sum over the tokens of a sequence; the mean keeps the budget's weight comparable between lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsity_lib import lm
from sparsity_lib.cwic.convert import Registry
from sparsity_lib.cwic.layers import CWICLinear


@dataclass(frozen=True)
class Distillation:
    """Divergences of one batch, nats a token, with gradients. mse: of the last hidden states, None where not asked for."""

    forward_kl: Tensor
    reverse_kl: Tensor
    mse: Tensor | None

    @property
    def loss(self) -> Tensor:
        return (self.forward_kl + self.reverse_kl) / 2


def both_divergences(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and KL(student || teacher) of logits [tokens, vocabulary], each [tokens]."""
    target, own = functional.log_softmax(teacher.float(), dim=-1), functional.log_softmax(student.float(), dim=-1)
    apart = target - own
    return (target.exp() * apart).sum(-1), -(own.exp() * apart).sum(-1)


def distil(
    student: nn.Module, teacher: nn.Module, hidden: Tensor, reference: Tensor, *, registry: Registry | None = None,
    valid: Tensor | None = None, mse: bool = False,
) -> Distillation:
    """Divergences between two language models at the head, chunk by chunk.

    Each chunk's logits are dropped and computed again when gradients are wanted, so that no more than
    `lm.HEAD_ELEMENTS` of each model's are ever kept; a granular head works as any other and leaves its cost in the ledger.

    Parameters
    ----------
    hidden, reference
        Final hidden states of student and teacher, [batch, tokens, width].
    registry
        Of the student, where it is granular.
    valid
        Tokens that count, boolean [batch * tokens]; None: all.
    """
    rows, target = hidden.flatten(0, -2), reference.detach().flatten(0, -2)
    chosen = torch.ones(len(rows), device=rows.device) if valid is None else valid.float()
    head = student.get_output_embeddings()
    granular = registry is not None and isinstance(head, CWICLinear) and registry.ledger.enabled
    if granular:
        head.observe(rows)  # once for all tokens: chunks see the statistics as they are then

    def piece(own: Tensor, other: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, cost = head.product(own) if granular else (head(own), own.new_zeros(len(own)))
        with torch.no_grad():
            wanted = lm.logits(teacher, other)
        forward, reverse = both_divergences(wanted, lm.scaled(student, raw))
        return (forward * counted).sum(), (reverse * counted).sum(), cost

    sums, costs = [], []
    for part in lm.chunks(len(rows), student):
        forward, reverse, cost = checkpoint(
            piece, rows[part], target[part], chosen[part], use_reentrant=False, preserve_rng_state=False)
        sums.append(torch.stack([forward, reverse]))
        costs.append(cost)
    if granular:
        registry.ledger.costs[head.name] = torch.cat(costs)
    forward, reverse = torch.stack(sums).sum(0) / chosen.sum()
    apart = (rows.float() - target.float()).square().mean(-1) if mse else None
    return Distillation(forward, reverse, None if apart is None else (apart * chosen).sum() / chosen.sum())
