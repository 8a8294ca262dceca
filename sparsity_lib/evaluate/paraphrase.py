"""A sentence encoder on MRPC: do two sentences say the same, judged by the cosine of their embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from sparsity_lib.errors import SparsityError, refuse


@torch.no_grad()
def embed(model: nn.Module, tokenizer, sentences: Sequence[str], *, longest: int = 128, batch_size: int = 32) -> Tensor:
    """Embeddings [sentences, hidden], the mean of a sentence's last hidden states at length 1, as all-MiniLM-L6-v2 makes them.

    Sentences of one length share a batch, so that no padding is read or counted; more than `longest` tokens are cut.
    """
    if not sentences:
        raise refuse("sentences", list(sentences), "at least one text")
    rows = [tokenizer(text, truncation=True, max_length=longest).input_ids for text in sentences]
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        by_length[len(row)].append(place)
    device, found = next(model.parameters()).device, {}
    for places in by_length.values():
        for start in range(0, len(places), batch_size):
            some = places[start : start + batch_size]
            hidden = model(input_ids=torch.tensor([rows[p] for p in some], device=device)).last_hidden_state
            found.update(zip(some, nn.functional.normalize(hidden.float().mean(1), dim=-1).cpu(), strict=True))
    return torch.stack([found[place] for place in range(len(rows))])


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The border above which calling a score positive is right most often, midway between two scores; the lowest of equals."""
    scores, labels = _checked(scores, labels)
    distinct = np.unique(scores)
    borders = np.concatenate([[distinct[0] - 1], (distinct[:-1] + distinct[1:]) / 2, [distinct[-1] + 1]])
    right = [((scores > border) == labels).sum() for border in borders]
    return float(borders[int(np.argmax(right))])


def judged(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each pair is judged rightly, [pairs] of 0 and 1, by the border that suits the *other* half of the pairs best.

    Halves are the even and the odd places, so the same pairs are judged by the same ones whatever the model.
    """
    scores, labels = _checked(scores, labels)
    right = np.zeros(len(scores))
    for half in (0, 1):
        border = best_threshold(scores[1 - half :: 2], labels[1 - half :: 2])
        right[half::2] = (scores[half::2] > border) == labels[half::2]
    return right


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """How often a positive scores above a negative, equal scores counting half.

    Raises
    ------
    SparsityError
        If only one label occurs.
    """
    scores, labels = _checked(scores, labels)
    positive = int(labels.sum())
    if positive in (0, len(labels)):
        raise SparsityError("The area under the curve needs pairs of both labels.")
    rank = rankdata(scores)[labels].sum()
    return float((rank - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels).astype(bool)
    if scores.shape != labels.shape or scores.ndim != 1 or len(scores) < 2:
        raise SparsityError(f"Judging needs one label a score, at least two, got {scores.shape} and {labels.shape}.")
    if not np.isfinite(scores).all():
        raise SparsityError("Some scores are not finite. Fix: check the model's weights.")
    return scores, labels
