"""Counting: which weights a token reads, from real masks, in one way for every method.

Rules. A weight is read by a token if it takes part in a product that is not known to be zero.
- Linear layers: kept input columns times kept output rows.
- The head counts in full, unless a recipe drops its inputs. Embedding tables (tokens, positions) count one row a token;
  where the head is tied to the token table, the table counts as the head.
- Experts: those the token is routed to. Norms, biases, convolutions and the router count in full.
- What a repair reads on top (a low-rank product) counts in full, for every token. What a transform reads that is not absorbed
  (a rotation) is told apart (`Account.transform_weights`): it is in no share.
- An entry that is zero by itself (as after a ReLU) needs no weights, like one that was dropped; a neuron that was chosen
  before its gate is known does.
The share skipped is 1 - read / read by the dense model. Papers count otherwise (`Account.paper_counts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.by_block import final_states
from sparsity_lib.errors import SparsityError
from sparsity_lib.experts import is_experts
from sparsity_lib.install import Installed, installed_on
from sparsity_lib.progress import track
from sparsity_lib.recipe import rows_read
from sparsity_lib.sites import HEAD_IN, UP_IN, Linear, find_sites

#: Where a model whose masks are no plan's, but learned inside its layers, keeps its function (model, ids) -> Account.
COUNTER = "_sparsity_counter"


def weights_per_token(model: nn.Module) -> int:
    """Weights a dense forward of `model` reads for one token, by the rules of this module."""
    total = 0
    seen: set[int] = set()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            tied = head is not None and parameter is head.weight
            if isinstance(module, nn.Embedding):
                total += parameter.shape[1] + (parameter.numel() if tied else 0)
            elif is_experts(module) and parameter.ndim == 3:
                config = getattr(model, "config", None)
                routed = getattr(config, "num_experts_per_tok", None) or 1
                total += parameter.numel() // parameter.shape[0] * routed
            else:
                total += parameter.numel()
    sparsity = [b.numel() for name, b in model.named_parameters() if ".sparsity." in name]
    return total - sum(sparsity)


def weights_by_part(model: nn.Module) -> dict[str, int]:
    """Weights a dense forward reads for one token, by part: attention, ffn, head, and the rest; mixer where there is one."""
    linears = find_sites(model).linears
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts = {
        "attention": sum(x.weights for x in linears if not (x.in_ffn or x.in_mixer)),
        "ffn": sum(x.weights for x in linears if x.in_ffn),
        "head": 0 if head is None else head.weight.numel(),
    }
    if mixer := sum(x.weights for x in linears if x.in_mixer):
        parts["mixer"] = mixer
    return {**parts, "rest": weights_per_token(model) - sum(parts.values())}


@dataclass(frozen=True)
class Account:
    """What a sparse model left unread on some text, averaged over tokens.

    Shares are of all weights a dense forward reads, unless the name says otherwise.
    """

    method: str
    #: Weights the dense model reads for one token.
    dense_weights: int
    #: Weights the sparse model reads for one token, mean over tokens.
    read_weights: float
    #: Share of all weights skipped: the number every table of the book reports.
    skipped: float
    #: 5th and 95th percentile over tokens of that share.
    skipped_low: float
    skipped_high: float
    #: Share of entries dropped by site kind, over layers and tokens.
    site_sparsity: dict[str, float]
    #: Share of entries dropped by layer, for each site kind; layers without such a site are left out.
    layer_sparsity: dict[str, list[float]]
    #: Share of all weights skipped by role of the matrix (q, k, v, o, gate, up, down, ...).
    skipped_by_role: dict[str, float]
    #: Weights read on top by transforms if they run at decode time instead of being absorbed.
    transform_weights: int
    #: How the papers would put the same masks.
    paper_counts: dict[str, float]
    tokens: int
    #: Weights read on top by repairs; `read_weights` and `skipped` have them, the shares by role and paper do not.
    repair_weights: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Recorder:
    """Collects, for one site, the number of entries kept by each token."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []

    def __call__(self, kept: Tensor) -> None:
        self.counts.append(kept.detach().flatten().cpu())

    def density(self, width: int) -> Tensor:
        return torch.cat(self.counts).double() / width


def token_densities(model: nn.Module, ids: Tensor, batch_size: int = 1) -> dict[str, Tensor]:
    """Share of entries kept at each installed site ("LAYER.SITE") by each token of `ids` [sequences, tokens]."""
    batches = lm.check_ids(ids).split(batch_size)
    with recorded(model) as counted, torch.no_grad():
        for hidden in track(final_states(model, batches), desc="counting weights", total=len(batches), unit="batch"):
            lm.show_head(model, hidden)
    return counted()


@contextmanager
def recorded(model: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Count in every forward inside the block, whoever calls it (a benchmark, an encoder); padding counts as tokens.

    Yields a function that gives the share of entries kept at each installed site ("LAYER.SITE") by each token so far.

    Raises
    ------
    SparsityError
        If the model is dense.
    """
    state = installed_on(model)
    if state is None:
        raise SparsityError("The model is dense, there are no masks to count. Fix: install(model, plan) first.")
    recorders = {name: _Recorder() for name in state.sparsifiers}
    try:
        for name, sparsifier in state.sparsifiers.items():
            sparsifier.recorder = recorders[name]
        yield lambda: {name: r.density(state.sparsifiers[name].width) for name, r in recorders.items()}
    finally:
        for sparsifier in state.sparsifiers.values():
            sparsifier.recorder = None


def account(model: nn.Module, tokenizer=None, *, ids: Tensor | None = None, tokens: int = 2048, length: int = 512) -> Account:
    """Count the weights a sparse language model reads on evaluation text.

    Parameters
    ----------
    model
        With a plan installed.
    tokenizer
        Needed where the embedded evaluation text is used.
    ids
        Own text, token ids [sequences, tokens].

    Raises
    ------
    SparsityError
        If the model is dense, or there is neither a tokenizer nor ids.
    """
    if ids is None:
        if tokenizer is None:
            raise SparsityError("Counting needs text. Fix: account(model, tokenizer), or pass ids=.")
        from sparsity_lib.assets.texts import token_sequences  # the library's core works without the assets

        ids = token_sequences(tokenizer, "evaluation", tokens=tokens, length=length)
    if (count_own := model.__dict__.get(COUNTER)) is not None:
        return count_own(model, ids)
    return summarise(model, token_densities(model, ids))


def summarise(model: nn.Module, densities: Mapping[str, Tensor]) -> Account:
    """Turn densities per site and token into the counts of one method."""
    state = installed_on(model)
    column, row = {}, {}
    densities = _by_token(state, densities)
    for name, density in densities.items():
        site = state.placed[name]
        column.update(dict.fromkeys(site.column_readers, density))
        row.update(dict.fromkeys(site.row_readers, density))
    head = state.sites.head
    linears = state.sites.readable if head is not None and head.name in column else state.sites.linears
    read = {linear.name: _share_read(linear, column, row) for linear in linears}
    kinds = {name.split(".")[1] for name in densities}
    layers = {
        kind: [1 - float(densities[f"{i}.{kind}"].mean()) for i in range(state.sites.layers) if f"{i}.{kind}" in densities]
        for kind in kinds
    }
    extra = sum(s.rule.transform.weights_read(state.placed[name]) for name, s in state.sparsifiers.items())
    repair = sum(piece.weights_read(state.placed[name]) for name, s in state.sparsifiers.items() for piece in s.rule.repair)
    return compose(state.recipe.method, linears, read, weights_per_token(model), layers, extra, repair)


def compose(
    method: str, linears: tuple[Linear, ...], read: Mapping[str, Tensor | float], dense: int,
    layers: Mapping[str, list[float]], extra: int = 0, repair: int = 0,
) -> Account:
    """An account from the share of each matrix that each token read: name -> [tokens], or one number for all.

    layers: share of entries dropped by layer for each kind of site; the head may be among the linears, with role "head".
    extra, repair: weights that transforms and repairs read besides.
    """
    tokens = max((share.numel() for share in read.values() if isinstance(share, Tensor)), default=0)
    skipped = torch.zeros(tokens, dtype=torch.float64)
    by_role: dict[str, float] = {}
    for linear in linears:
        left = torch.as_tensor(linear.weights * (1 - read[linear.name]), dtype=torch.float64)
        skipped += left
        by_role[linear.role] = by_role.get(linear.role, 0.0) + float(left.mean()) / dense
    skipped -= repair
    share = skipped / dense
    return Account(
        method=method, dense_weights=dense, read_weights=float(dense - skipped.mean()),
        skipped=float(share.mean()), skipped_low=float(share.quantile(0.05)), skipped_high=float(share.quantile(0.95)),
        site_sparsity={k: sum(v) / len(v) for k, v in layers.items()}, layer_sparsity=dict(layers),
        skipped_by_role=by_role, transform_weights=extra,
        paper_counts=_paper_counts(tuple(x for x in linears if x.role != "head"), by_role, dense), tokens=tokens,
        repair_weights=repair,
    )


def _by_token(state: Installed, densities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Densities with one number a token: sites inside experts, seen once a routed expert, enter as their mean, and so does
    the head where it saw fewer tokens than the blocks."""
    routed = {linear.name: linear.per_token for linear in state.sites.linears}
    found = dict(densities)
    for name, density in densities.items():
        site = state.placed[name]
        if site.experts and site.kind != UP_IN:
            found[name] = density.mean().expand(len(density) // routed[site.column_readers[0]])
    in_blocks = [len(density) for name, density in found.items() if state.placed[name].kind != HEAD_IN]
    for name, density in found.items():
        if state.placed[name].kind == HEAD_IN and in_blocks and len(density) != in_blocks[0]:
            found[name] = density.mean().expand(in_blocks[0])  # benchmarks ask the head about some tokens only
    return found


def _share_read(linear: Linear, column: Mapping[str, Tensor], row: Mapping[str, Tensor]) -> Tensor | float:
    return column.get(linear.name, 1.0) * rows_read(linear, row)


def _paper_counts(linears: tuple[Linear, ...], by_role: Mapping[str, float], dense: int) -> dict[str, float]:
    """The same skipped weights over the denominators papers use: the FFN, or all linears but the head."""
    counts = {}
    for name, chosen in (("ffn", [x for x in linears if x.in_ffn]), ("linears", list(linears))):
        total = sum(x.weights for x in chosen)
        left = sum(by_role.get(role, 0.0) for role in dict.fromkeys(x.role for x in chosen)) * dense
        counts[name] = left / total if total else 0.0
    return counts
