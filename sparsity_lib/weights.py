"""Weight pruning, the baseline of activation pruning at equal patterns: magnitude and Wanda, N:M or unstructured.

    with pruned_weights(model, WeightPruning(NofM(2, 4), "wanda"), tokenizer):
        ...                                     # the same model, with half of the blocks' weights at zero

All linear layers of the blocks are pruned along their inputs; embeddings and head are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsity_lib.accounting import weights_per_token
from sparsity_lib.attach import attach
from sparsity_lib.blocks import Blocks
from sparsity_lib.collectors import ColumnSquares
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.fit import LENGTH, TOKENS, calibration_stream
from sparsity_lib.install import installed_on
from sparsity_lib.parts.nm import NofM, check_width
from sparsity_lib.parts.select import TopK
from sparsity_lib.passes import Text
from sparsity_lib.sites import GATE, HEAD_IN, Site, SiteMap, find_sites
from sparsity_lib.stored import refuse_streamed

#: Score of a weight W_ij, i an output and j an input.
SCORES = {
    "magnitude": "|W_ij|",
    "wanda": "|W_ij| * rms of x_j over calibration text (arXiv 2306.11695)",
}
#: What a density is kept in: every output's weights, or the whole matrix.
SCOPES = ("row", "matrix")


@dataclass(frozen=True)
class WeightPruning:
    """Which weights of a linear layer stay.

    Parameters
    ----------
    select
        `NofM(n, m)`, along the inputs of every output, or `TopK(density)`.
    score
        A name of `SCORES`.
    scope
        Of a `TopK`: "row" keeps the share in the weights of each output (Wanda's comparison group), "matrix" in the
        whole matrix.
    """

    select: NofM | TopK
    score: str = "wanda"
    scope: str = "row"

    def __post_init__(self) -> None:
        if not isinstance(self.select, (NofM, TopK)):
            raise refuse("select of weights", self.select, "NofM(n, m) or TopK(density)")
        if not isinstance(self.score, str) or self.score not in SCORES:
            raise unknown("score of weights", self.score, SCORES)
        if not isinstance(self.scope, str) or self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if isinstance(self.select, NofM) and self.scope != "row":
            raise refuse("scope of N:M", self.scope, "row: its groups lie along the inputs of one output")

    def mask(self, weight: Tensor, rms: Tensor | None = None) -> Tensor:
        """Boolean mask [out, in] of the weights [out, in] that stay; `rms` [in] is that of the inputs, for Wanda."""
        scores = weight.detach().float().abs()
        if self.score == "wanda":
            scores = scores * rms.to(scores)
        if self.scope == "matrix":
            return self.select(scores.flatten(), {}).view_as(scores)
        return self.select(scores, {})

    def to_json(self) -> dict[str, Any]:
        return {"select": self.select.to_json(), "score": self.score, "scope": self.scope}


class Pruned:
    """A model whose weights were pruned in place, and the weights it had."""

    def __init__(self, model: nn.Module, pruning: WeightPruning) -> None:
        self.model, self.pruning = model, pruning
        self._originals: dict[str, Tensor] = {}
        #: Share of weights at zero in each layer that was pruned.
        self.sparsity: dict[str, float] = {}
        self._zeros = 0

    @property
    def skipped(self) -> float:
        """Share of all weights a dense forward reads that are zero, as `Account.skipped` counts them."""
        return self._zeros / weights_per_token(self.model)

    def prune(self, name: str, rms: Tensor | None) -> None:
        """Prune one layer."""
        module = self.model.get_submodule(name)
        original = module.weight.data
        flipped = isinstance(module, Conv1D)  # stored as [in, out]
        mask = self.pruning.mask(original.T if flipped else original, rms)
        mask = mask.T if flipped else mask
        self._originals[name] = original
        module.weight.data = original.masked_fill(~mask, 0)
        zeros = mask.numel() - int(mask.sum())
        self.sparsity[name] = zeros / mask.numel()
        self._zeros += zeros

    def restore(self) -> nn.Module:
        """Give the model its weights back, bit by bit as they were. A second call does nothing."""
        for name, original in self._originals.items():
            self.model.get_submodule(name).weight.data = original
        self._originals.clear()
        self.model.__dict__.pop("_weights_pruned", None)
        return self.model


def prune_weights(
    model: nn.Module, pruning: WeightPruning, tokenizer=None, *, ids: Tensor | None = None, tokens: int = TOKENS,
    length: int = LENGTH, source: str | None = None, seed: int = 0, batch_size: int = 1, sequential: bool = False,
    rms: Mapping[str, Tensor] | None = None,
) -> Pruned:
    """Prune the blocks' linear layers in place; `restore` of what is returned gives the weights back.

    Parameters
    ----------
    model
        Dense. A plan may be installed afterwards: it then drops activations of the pruned model.
    tokenizer, ids, tokens, length, source, seed, batch_size
        Calibration text of Wanda, as for `fit`; magnitude needs none.
    sequential
        Read each block's statistics after the blocks before it were pruned, as Wanda's release does, instead of all on the
        dense model.
    rms
        Of Wanda, instead of text: what `input_rms` found on the dense model, for several prunings of it.

    Raises
    ------
    SparsityError
        If the model is pruned or sparse already, has experts, M does not divide a layer's inputs, or Wanda has no text;
        if `rms` is not that of this model's layers, or comes with `sequential`.
    """
    _check_model(model)
    if not isinstance(sequential, bool):
        raise refuse("sequential", sequential, "true or false")
    sites = find_sites(model)
    _check_layers(sites, pruning)
    if rms is not None:
        _check_rms(sites, rms, sequential)
    pruned = Pruned(model, pruning)
    model.__dict__["_weights_pruned"] = pruned
    try:
        with torch.no_grad():
            if pruning.score == "magnitude":
                for linear in sites.linears:
                    pruned.prune(linear.name, None)
                return pruned
            if rms is None:
                stream, _ = calibration_stream(tokenizer, ids, None, tokens, length, source, seed, batch_size)
                if sequential:
                    _prune_in_turn(pruned, Blocks(model, stream, sites), sites)
                    return pruned
                rms = input_rms(Text(model, stream), list(sites.sites.values()))
            for name, found in rms.items():
                pruned.prune(name, found)
    except BaseException:
        pruned.restore()
        raise
    return pruned


@contextmanager
def pruned_weights(model: nn.Module, pruning: WeightPruning | None, tokenizer=None, **options) -> Iterator[nn.Module]:
    """The model with its weights pruned inside the block, and bit by bit as they were after it; None leaves them.

    Options are those of `prune_weights`.
    """
    if pruning is None:
        yield model
        return
    pruned = prune_weights(model, pruning, tokenizer, **options)
    try:
        yield model
    finally:
        pruned.restore()


def input_rms(text: Text, sites: list[Site]) -> dict[str, Tensor]:
    """Root mean square of each input over the text, float64 [in], for every layer that reads one of these sites."""
    found: dict[str, ColumnSquares] = {}
    handles = []
    try:
        for site in (site for site in sites if site.kind not in (GATE, HEAD_IN)):
            collector = ColumnSquares(site.width)
            found |= dict.fromkeys(site.column_readers, collector)

            def tap(x: Tensor, collector: ColumnSquares = collector) -> Tensor:
                collector.update(x)
                return x

            handles.append(attach(text.model, site, tap))
        text.run(desc="calibrating weights")
    finally:
        for handle in handles:
            handle.remove()
    return {name: collector.rms() for name, collector in found.items()}


def _prune_in_turn(pruned: Pruned, blocks: Blocks, sites: SiteMap) -> None:
    with blocks:
        for layer in range(sites.layers):
            for name, rms in input_rms(blocks, [s for s in sites.sites.values() if s.layer == layer]).items():
                pruned.prune(name, rms)
            if layer + 1 < sites.layers:
                blocks.advance()


def _check_model(model: nn.Module) -> None:
    refuse_streamed(model, "Pruning weights in place")
    if installed_on(model) is not None:
        raise SparsityError("Weights of a sparse model were to be pruned. Fix: uninstall(model), prune, then install again.")
    if "_weights_pruned" in model.__dict__:
        raise SparsityError("The model's weights are pruned already. Fix: restore them first (Pruned.restore).")


def _check_rms(sites: SiteMap, rms: Mapping[str, Tensor], sequential: bool) -> None:
    if sequential:
        raise refuse("sequential with rms", True, "false: rms is the dense model's")
    wanted, got = ({x.name: (x.inputs,) for x in sites.linears}, {name: tuple(found.shape) for name, found in rms.items()})
    if odd := [name for name in {**wanted, **got} if wanted.get(name) != got.get(name)]:
        raise refuse(f"rms of {odd[0]}", got.get(odd[0]), str(wanted.get(odd[0])), "take it from input_rms on this model")


def _check_layers(sites: SiteMap, pruning: WeightPruning) -> None:
    experts = {reader for site in sites.sites.values() if site.experts for reader in site.column_readers}
    for linear in sites.linears:
        if linear.name in experts:
            raise SparsityError(f"{linear.name} holds several experts, whose weights are not pruned. Fix: a model without.")
        if isinstance(pruning.select, NofM):
            check_width(linear.inputs, pruning.select.m, pruning.select.pad, f"inputs of {linear.name}")
