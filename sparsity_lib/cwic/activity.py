"""Where a granular model computes: how often each entry is kept, and how many weights each token reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.accounting import Account, compose
from sparsity_lib.checks import count
from sparsity_lib.cwic.convert import HEAD, Registry, registry_of
from sparsity_lib.cwic.granular import masks
from sparsity_lib.errors import refuse
from sparsity_lib.passes import evaluating
from sparsity_lib.progress import track
from sparsity_lib.sites import Linear
from sparsity_lib.train.packing import PADDING, model_inputs


@dataclass(frozen=True)
class Activity:
    """Masks of a granular model on some text.

    frequency: layer -> share of tokens that keep an entry, float32 [stripes, inputs] (a neuron mask: [1, neurons]).
    read: layer -> weights read, float64 [sequences, tokens]. valid: tokens that are no padding, [sequences, tokens].
    always: weights that every token reads.
    """

    frequency: dict[str, Tensor]
    read: dict[str, Tensor]
    valid: Tensor
    always: int
    dense: int
    layers: tuple[tuple[str, int, str, int], ...]  # name, block (the head: -1), role, weights when dense

    def active_parameters(self) -> Tensor:
        """Weights read by each token, [sequences, tokens]; what colours a text by its compute."""
        return self.always + torch.stack(list(self.read.values())).sum(0)

    def per_sequence(self, chosen: Tensor | None = None) -> Tensor:
        """Mean weights a token of each sequence, over those `chosen` ([sequences, tokens], say a question's own) or all.

        Raises SparsityError for a sequence without any.
        """
        chosen = self.valid if chosen is None else chosen & self.valid
        tokens = chosen.sum(1)
        if (tokens == 0).any():
            raise refuse("tokens chosen", tokens.tolist(), "at least one in each sequence")
        return (self.active_parameters() * chosen).sum(1) / tokens

    def ratio(self) -> float:
        """Dense weights over weights read, of all tokens together."""
        return float(self.dense / self.active_parameters()[self.valid].mean())

    def density(self) -> dict[str, dict[int, float]]:
        """Share of the weights read: role ("q", ..., "ffn" for up and down, "head") -> block -> mean over tokens."""
        found: dict[str, dict[int, float]] = {}
        for name, block, role, weights in self.layers:
            found.setdefault(role, {})[block] = float(self.read[name][self.valid].mean() / weights)
        return found


class _Watch:
    """Adds up what reaches the masks of each layer."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.read: dict[str, list[Tensor]] = {}
        self.valid: Tensor | None = None

    def __call__(self, layer: nn.Module, x: Tensor) -> None:
        mean, scale, _ = layer.sparsity.rule()
        read, often = torch.zeros(len(x), dtype=torch.float64, device=x.device), []
        for mask, each in zip(masks(x, layer.sparsity.theta, mean, scale), layer.entry_weights(), strict=True):
            read += mask.sum(-1) * each
            often.append(mask[self.valid].sum(0))
        kept = torch.stack(often).cpu()
        self.kept[layer.name] = self.kept.get(layer.name, 0) + kept
        self.read.setdefault(layer.name, []).append(read.cpu())


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor, segments: Tensor | None = None, batch_size: int = 1) -> Activity:
    """Watch a granular model's masks on token ids [sequences, tokens], in evaluation mode.

    `segments` as `packing.pack` gives them, for packed or padded rows.
    Raises SparsityError for a model without granular layers.
    """
    registry = registry_of(model)
    lm.check_ids(ids)
    count("batch_size", batch_size)
    valid = torch.ones_like(ids, dtype=torch.bool) if segments is None else segments != PADDING
    device, watch = next(model.parameters()).device, _Watch()
    registry.ledger.recorder = watch
    try:
        with evaluating(model):
            for start in track(range(0, len(ids), batch_size), desc="watching masks", unit="batch"):
                rows = slice(start, start + batch_size)
                watch.valid = valid[rows].flatten().to(device)
                inputs = model_inputs(model, ids[rows].to(device), None if segments is None else segments[rows].to(device))
                hidden = lm.hidden_states(model, inputs.pop("input_ids"), **inputs)
                if registry.head is not None:  # its masks alone are wanted, no logits
                    watch(registry.layers[registry.head], hidden.flatten(0, -2))
    finally:
        registry.ledger.recorder = None
        registry.take_costs()
    tokens = int(valid.sum())
    return Activity(
        frequency={name: kept.float() / tokens for name, kept in watch.kept.items()},
        read={name: torch.cat(parts).view_as(ids) for name, parts in watch.read.items()},
        valid=valid.cpu(), always=registry.always, dense=registry.dense, layers=tuple(_described(registry)))


def account(model: nn.Module, ids: Tensor) -> Account:
    """What `sparsity_lib.account` says of a granular model: the same rules, on its own masks."""
    registry, found = registry_of(model), measure(model, ids)
    share: dict[str, Tensor] = {}
    linears = list(registry.sites.linears)
    for name, _, role, weights in found.layers:
        read = found.read[name].flatten() / weights
        if role == HEAD:
            head = registry.layers[name]
            linears.append(Linear(name, registry.sites.layers, HEAD, head.in_features, head.out_features))
        for reader in _matrices(registry, name):
            share[reader] = read
    layers = {role: [1 - density for density in by_block.values()] for role, by_block in found.density().items()}
    return compose("cwic", tuple(linears), {x.name: share.get(x.name, 1.0) for x in linears}, found.dense, layers)


def _matrices(registry: Registry, name: str) -> list[str]:
    """The matrices that a layer's mask decides over: its own, or a gate's up and down."""
    by_act = {site.act: [*site.row_readers, *site.column_readers] for site in registry.sites.sites.values() if site.act}
    return by_act.get(name, [name])


def _described(registry: Registry):
    block = {linear.name: linear.layer for linear in registry.sites.linears}
    block |= {site.act: site.layer for site in registry.sites.sites.values() if site.act}
    for name, layer in registry.layers.items():
        yield name, block.get(name, -1), layer.role, layer.dense_cost
