"""Measures of skewness and of how alike two rankings are."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from sparsity_lib.errors import refuse


def lorenz(values: Tensor, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Lorenz curve of non-negative values [tokens, width], averaged over tokens.

    Returns
    -------
    (share of entries, share of the total they hold)
        Entries sorted from the smallest up; both [points], from 0 to 1.
    """
    if values.dim() != 2 or values.numel() == 0 or bool((values < 0).any()):
        raise refuse("values", tuple(values.shape), "non-negative numbers [tokens, width], not empty")
    ordered = values.double().sort(-1).values.cumsum(-1)
    total = ordered[:, -1:].clamp_min(1e-300)
    curve = torch.cat([torch.zeros(1, dtype=torch.float64), (ordered / total).mean(0)]).numpy()
    grid = np.linspace(0, 1, points)
    return grid, np.interp(grid, np.linspace(0, 1, len(curve)), curve)


def gini(values: Tensor) -> Tensor:
    """Gini coefficient of each row of non-negative values [..., width]: 0 all equal, 1 all in one entry."""
    width = values.shape[-1]
    ordered = values.double().sort(-1).values
    weight = torch.arange(1, width + 1, dtype=torch.float64, device=values.device)
    total = ordered.sum(-1)
    found = 2 * (weight * ordered).sum(-1) / (width * total) - (width + 1) / width
    return torch.where(total > 0, found, torch.zeros_like(total))  # a row of zeros is all equal


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|a and b| / |a or b| of boolean masks [..., width], over the last axis; 1 for two empty masks."""
    both, either = (a & b).sum(-1).double(), (a | b).sum(-1).double()
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))


def spearman(a: Tensor, b: Tensor) -> np.ndarray:
    """Rank correlation of each row of a with the same row of b, [rows, width] -> [rows]."""
    ranks = [stats.rankdata(x.double().cpu().numpy(), axis=-1) for x in (a, b)]
    left, right = (r - r.mean(-1, keepdims=True) for r in ranks)
    scale = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    return (left * right).sum(-1) / np.where(scale > 0, scale, 1)


def spread(saliency: Tensor) -> dict[str, float]:
    """How much a static multiplier varies: its coefficient of variation and the ratio of its 90th to 10th percentile."""
    values = saliency.double()
    low, high = values.quantile(0.1), values.quantile(0.9)
    return {"cv": float(values.std() / values.mean()), "p90_p10": float(high / low.clamp_min(1e-300))}
