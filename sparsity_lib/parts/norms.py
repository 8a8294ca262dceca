"""Scores of the N:M study (arXiv 2509.22166) that weigh an entry by a norm of its channel or of the weights behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsity_lib.checks import fraction
from sparsity_lib.collectors import ColumnSquares
from sparsity_lib.errors import refuse
from sparsity_lib.parts.base import Score, as_float32, part
from sparsity_lib.sites import Site


@part("clact")
@dataclass(frozen=True)
class Clact(Score):
    """|x_ti| * ||X[:, i]||_2 / ||X[t, :]||_2 (CLACT, arXiv 2509.22166): a channel's own size, and the token's.

    The paper's X is the batch at hand, whose columns would hold later tokens and padding, and at batch 1 the token alone;
    here column norms come from calibration text, as root mean squares (the text's length is one factor for all channels).
    The token's norm does not change which entries of a token come first, only how tokens compare under a threshold.
    """

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"norm": (site.width,)}

    def collector(self, site: Site) -> ColumnSquares:
        return ColumnSquares(site.width)

    def fit(self, collector: ColumnSquares, site: Site) -> dict[str, Tensor]:
        return {"norm": collector.rms().float()}

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        z = as_float32(z)
        size = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return z.abs() * tensors["norm"] / size


@part("amber")
@dataclass(frozen=True)
class Amber(Score):
    """|x_i| * ||What[:, i]||_2 / min_k ||What[:, k]||_2 (Amber Pruner, arXiv 2508.02128, as used by 2509.22166).

    What is W standardised, (W - mean) / std, by the mean and deviation of its entries inside its `outliers` to
    1 - `outliers` quantiles; entries outside have no part in the norms. Each matrix that reads the site is standardised
    by itself, then they are stacked, as the norms of `column_norm` are.

    Parameters
    ----------
    outliers
        Share of a matrix's entries left out at either end.
    """

    outliers: float = 0.005

    def __post_init__(self) -> None:
        if fraction("outliers", self.outliers, zero=True) >= 0.5:
            raise refuse("outliers", self.outliers, "a number in [0, 0.5)")

    def check(self, site: Site) -> None:
        if site.experts:
            raise refuse("score at an expert site", self.kind, "a score without weight norms", "use magnitude")

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"norm": (site.width,)}

    def fit(self, collector: None, site: Site) -> dict[str, Tensor]:
        square = sum(self.standardised(site.input_weight(reader)).square().sum(0) for reader in site.column_readers)
        norm = square.sqrt()
        if not (norm > 0).any():
            return {"norm": torch.ones(site.width)}  # constant weights: nothing tells the channels apart
        return {"norm": (norm / norm[norm > 0].min()).float()}

    def standardised(self, weight: Tensor) -> Tensor:
        """What of one matrix [out, in], float64; 0 outside of the quantiles."""
        weight = weight.detach().double().cpu()
        low, high = np.quantile(weight.numpy(), [self.outliers, 1 - self.outliers])
        inside = (weight >= low) & (weight <= high)
        kept = weight[inside]
        deviation = kept.std(correction=0)
        if deviation == 0:
            return torch.zeros_like(weight)
        return torch.where(inside, (weight - kept.mean()) / deviation, 0.0)

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(z).abs() * tensors["norm"]
