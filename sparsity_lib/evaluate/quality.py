"""How far a sparse model is from its dense self: perplexity, and KL(dense || sparse) per token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.by_block import final_states
from sparsity_lib.checks import count
from sparsity_lib.distributed import spread
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.install import head_of, installed, installed_on
from sparsity_lib.plan import Plan
from sparsity_lib.progress import bar

#: Changes a model for as long as its context lasts.
Change = Callable[[], AbstractContextManager]
#: Hidden states [rows, hidden] -> float32 logits [rows, vocabulary].
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quality:
    """Sums over each sequence's predicted tokens; nats.

    nll[i] = -sum_t log p(x_t | x_<t), kl[i] = sum_t KL(dense || this), agree[i] = how often both put the same
    token first.
    """

    nll: tuple[float, ...]
    kl: tuple[float, ...]
    agree: tuple[float, ...]
    tokens: tuple[int, ...]

    def perplexity(self) -> Interval:
        """exp of the mean loss, with its interval over sequences."""
        return ratio_interval(self.nll, self.tokens, transform=np.exp)

    def divergence(self) -> Interval:
        """Mean KL(dense || this) in nats per token, with its interval over sequences."""
        return ratio_interval(self.kl, self.tokens)

    def agreement(self) -> Interval:
        """Share of tokens for which dense and sparse model predict the same next token."""
        return ratio_interval(self.agree, self.tokens)

    def to_json(self) -> dict:
        return {name: list(values) for name, values in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping) -> Quality:
        return Quality(*(tuple(data[name]) for name in FIELDS))


#: What a `Quality` holds, in its order.
FIELDS = ("nll", "kl", "agree", "tokens")


def difference(a: Quality, b: Quality, what: str = "kl") -> Interval:
    """Paired interval of a - b: mean KL ("kl", nats) or mean loss ("nll", nats) per token, same sequences resampled."""
    if what not in ("kl", "nll"):
        raise SparsityError(f"what = {what!r} is unknown: expected kl or nll.")
    if a.tokens != b.tokens:
        raise SparsityError("Two results can be paired only if they saw the same sequences.")
    return ratio_interval(np.subtract(getattr(a, what), getattr(b, what)), a.tokens)


def evaluate(
    model: nn.Module, plans: Mapping[str, Plan | Change | None], ids: Tensor, *, batch_size: int = 1, every: int = 1
) -> dict[str, Quality]:
    """Perplexity and divergence of several plans on one dense model and one text.

    Hidden states of all plans are taken first (they are small), then the head runs chunk by chunk, so that the
    dense logits are computed once and only few rows of each are in memory.

    Parameters
    ----------
    model
        Dense; each plan is installed in turn and removed again.
    plans
        name -> plan; None is the dense model. "dense" is added if it is missing. What is no plan (pruned weights, say) is a
        function that returns a context, inside which `model` is changed below its head.
    ids
        Token ids [sequences, tokens].
    every
        Predict only every n-th token of each sequence (wide heads are costly); all methods use the same.

    Raises
    ------
    SparsityError
        If the model is sparse already, or ids are not [sequences, tokens >= 2].
    """
    _check(model, ids)
    count("every", every)
    plans = {"dense": None, **plans}
    runs = {name: (model, plan) for name, plan in plans.items()}
    heads = {name: _head(model, plan) for name, plan in plans.items()}
    return _in_shares(model, runs, heads, ids, batch_size, every)


def evaluate_pair(dense: nn.Module, other: nn.Module, plan: Plan | None, ids: Tensor, *, every: int = 1) -> Quality:
    """Quality of another model (say, with LoRA merged) under `plan`, against `dense`; both share one vocabulary and head.

    The head must be the same because both models' hidden states go through `dense`'s: adapters sit on blocks only.
    """
    _check(dense, ids)
    head, own = (m.get_output_embeddings().weight for m in (dense, other))
    if head.shape != own.shape or not torch.allclose(head.float(), own.float(), rtol=1e-2, atol=1e-3):
        raise SparsityError("The two models have different heads. Fix: compare models that differ in their blocks only.")
    runs = {"dense": (dense, None), "other": (other, plan)}
    return _in_shares(dense, runs, {"other": _head(dense, plan)}, ids, 1, count("every", every), head.dtype)["other"]


def evaluate_other(dense: nn.Module, other: nn.Module, ids: Tensor, *, batch_size: int = 1, every: int = 1) -> Quality:
    """Quality of any other model of the same vocabulary against `dense`, each with its own head, on the same text.

    Raises
    ------
    SparsityError
        If the vocabularies differ in size, or as `evaluate` does.
    """
    _check(dense, ids)
    own, wanted = (m.get_output_embeddings().weight.shape[0] for m in (other, dense))
    if own != wanted:
        raise SparsityError(f"The vocabularies differ: {own} tokens and {wanted}. Fix: compare models of one tokenizer.")
    runs = {"dense": (dense, None), "other": (other, None)}
    return _in_shares(dense, runs, {"other": partial(lm.logits, other)}, ids, batch_size, count("every", every))["other"]


def _check(dense: nn.Module, ids: Tensor) -> None:
    if installed_on(dense) is not None:
        raise SparsityError("The model to compare with is sparse itself. Fix: uninstall(model) first.")
    if lm.check_ids(ids).shape[1] < 2:
        raise SparsityError("Sequences of one token predict nothing. Fix: at least two tokens each.")
    lm.check_head(dense)


def _in_shares(
    dense: nn.Module, runs: Mapping[str, tuple[nn.Module, Plan | Change | None]], heads: Mapping[str, Head], ids: Tensor,
    batch_size: int, every: int, dtype: torch.dtype | None = None,
) -> dict[str, Quality]:
    """All runs, "dense" among them, on the text; processes that work together (`distributed`) take some batches each.

    `dtype` is that of the hidden states for the head, where it is not the run's own.
    """
    places = torch.arange(0, ids.shape[1] - 1, every)

    def part(batches: Sequence[Tensor]) -> list[dict[str, Quality]]:
        with bar(total=len(runs) * len(batches), desc="running the models", unit="batch") as progress:
            hidden = {name: _hidden(*run, batches, places, progress).to(dtype) for name, run in runs.items()}
        return [_compare(dense, heads, hidden, torch.cat(list(batches))[:, 1:][:, places])]

    text = hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()
    parts = spread(ids.split(batch_size), part, same=(list(runs), batch_size, every, tuple(ids.shape), text))
    return {name: Quality(*(sum((getattr(found[name], what) for found in parts), ()) for what in FIELDS)) for name in runs}


@torch.no_grad()
def _hidden(model, plan, batches, places, progress) -> Tensor:
    found = []
    with plan() if callable(plan) else installed(model, plan):
        for hidden in final_states(model, batches):
            found.append(hidden[:, places])
            progress.update(1)
    return torch.cat(found)


def _head(model: nn.Module, plan: Plan | Change | None) -> Head:
    """The head of a dense model as a plan leaves it."""
    sparse = head_of(model, None if callable(plan) else plan)

    def logits(rows: Tensor) -> Tensor:
        with sparse():
            return lm.logits(model, rows)

    return logits


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product without a temporary of the rows' size."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


@torch.no_grad()
def _compare(
    model: nn.Module, heads: Mapping[str, Head], hidden: Mapping[str, Tensor], targets: Tensor
) -> dict[str, Quality]:
    """Sums over the predicted tokens. Hidden states of all, and what each but "dense" makes of its own; "dense" is `model`."""
    sequences, predicted = targets.shape
    rows = {name: h.flatten(0, 1) for name, h in hidden.items()}
    flat = targets.flatten().to(next(iter(rows.values())).device)
    sums = {name: torch.zeros(3, sequences * predicted, dtype=torch.float64) for name in hidden}
    pieces = list(lm.chunks(len(flat), model))
    with bar(total=len(pieces), desc="comparing predictions", unit="chunk") as progress:
        for piece in pieces:
            dense = lm.logits(model, rows["dense"][piece])
            chance, best = dense.softmax(-1), dense.argmax(-1)
            # KL = sum_v p_v (l_v - m_v) - lse(l) + lse(m), with l, m the logits of the dense and the sparse model
            dense_mean, dense_norm = _dot(chance, dense), dense.logsumexp(-1)
            for name in hidden:
                own = dense if name == "dense" else heads[name](rows[name][piece])
                norm = dense_norm if name == "dense" else own.logsumexp(-1)
                sums[name][0, piece] = (norm - own.gather(-1, flat[piece, None])[:, 0]).double().cpu()
                if name != "dense":
                    gap = (dense_mean - _dot(chance, own)).double() - (dense_norm - norm).double()
                    sums[name][1, piece] = gap.clamp_min(0).cpu()  # below zero only by rounding
                sums[name][2, piece] = (own.argmax(-1) == best).double().cpu()
            progress.update(1)
    found = {}
    for name, total in sums.items():
        nll, kl, agree = total.view(3, sequences, predicted).sum(-1).tolist()
        found[name] = Quality(tuple(nll), tuple(kl), tuple(agree), (predicted,) * sequences)
    return found
