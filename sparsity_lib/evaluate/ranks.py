"""Where in the vocabulary a sparse model goes wrong: among the words that the dense one finds likely, or among the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsity_lib.errors import refuse
from sparsity_lib.install import installed
from sparsity_lib.plan import Plan

#: Last rank of each group of words; the rest of the vocabulary is the last group.
EDGES = (1, 10, 100, 1000)


@torch.inference_mode()
def errors_by_rank(
    model: nn.Module, plans: Mapping[str, Plan], ids: Tensor, edges: Sequence[int] = EDGES
) -> dict[str, list[float]]:
    """Root mean square of log p_sparse(w) - log p_dense(w), by the rank that the dense model gives the word w.

    KL weighs a word by its probability, so what happens to unlikely words does not show in it.

    Parameters
    ----------
    plans
        Name -> what is installed into `model`.
    ids
        Text [sequences, length].
    edges
        Rising; group i has the ranks from edges[i - 1] + 1 to edges[i], counted from 1, and a last group all beyond.

    Returns
    -------
    dict
        Name -> nats, one number a group.

    Raises
    ------
    SparsityError
        If `edges` do not rise, or leave no word for the last group.
    """
    words = model.get_output_embeddings().weight.shape[0]
    if not edges or list(edges) != sorted(set(edges)) or not 0 < edges[0] <= edges[-1] < words:
        raise refuse("edges", tuple(edges), f"ranks that rise from at least 1 and stay below {words}, the size of the vocabulary")
    bounds = [0, *edges, words]
    sums = {name: torch.zeros(len(edges) + 1, dtype=torch.float64) for name in plans}
    positions = 0
    for sequence in ids:
        dense = _log_probabilities(model, sequence)
        order = dense.argsort(dim=-1, descending=True, stable=True)
        positions += len(sequence)
        for name, plan in plans.items():
            with installed(model, plan):
                apart = (_log_probabilities(model, sequence) - dense).gather(-1, order).square()
            sums[name] += torch.stack([apart[:, a:b].sum(dtype=torch.float64)
                                       for a, b in zip(bounds[:-1], bounds[1:], strict=True)]).cpu()
    sizes = positions * torch.tensor(bounds, dtype=torch.float64).diff()
    return {name: (total / sizes).sqrt().tolist() for name, total in sums.items()}


def _log_probabilities(model: nn.Module, sequence: Tensor) -> Tensor:
    """[length, vocabulary], float32."""
    return model(sequence[None]).logits[0].float().log_softmax(-1)
