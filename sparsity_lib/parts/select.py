"""Selections: from scores to the mask of entries that are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparsity_lib.checks import fraction
from sparsity_lib.collectors import Collector, LogHistogram
from sparsity_lib.distribution import Distribution
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.parts.base import Select, part
from sparsity_lib.sites import Site


@part("threshold")
@dataclass(frozen=True)
class Threshold(Select):
    """Keep scores above t, the (1 - density)-quantile of scores on calibration text, one t a site.

    CATS (arXiv 2404.08763), TEAL (2408.14690) and SCAP (2412.07174) all select so. The number kept
    differs from token to token; only its mean is set. Where all scores are equal, t is that score and all are dropped,
    as the equation says: a shift to their centre makes that exact.
    """

    density: float

    def __post_init__(self) -> None:
        fraction("density", self.density)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"threshold": (1,)}

    def collector(self, site: Site) -> Collector:
        return LogHistogram()

    def level(self) -> float:
        """The level of the quantile that is the threshold."""
        return 1 - self.density

    def fit(self, collector: Collector, site: Site) -> dict[str, Tensor]:
        """Read the threshold off the collected numbers.

        Raises
        ------
        SparsityError
            If there were too few: a quantile at level q needs at least 1 / q and 1 / (1 - q) of them.
        """
        if self.density == 1:
            return {"threshold": torch.tensor([-1.0])}  # below every score: nothing is dropped
        needed = math.ceil(1 / min(self.level(), 1 - self.level()) - 1e-6)
        if collector.numbers() < needed:
            raise SparsityError(
                f"The calibration text gave {collector.numbers()} numbers at site {site.kind} of layer {site.layer}; a threshold "
                f"for density = {self.density} needs at least {needed}. Fix: more tokens, or a density nearer to 0.5."
            )
        return {"threshold": torch.tensor([float(collector.quantile(self.level()))], dtype=torch.float32)}

    def __call__(self, scores: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return scores > tensors["threshold"]

    def kept(self, width: int) -> float:
        return self.density


@part("symmetric_threshold")
@dataclass(frozen=True)
class SymmetricThreshold(Threshold):
    """Keep |z| above t, the (1 - density / 2)-quantile of z itself: TEAL's release (0.5 + s / 2, s the sparsity).

    Equal to `Threshold` where z is distributed symmetrically around zero; elsewhere another share is kept than asked for.
    """

    only_scores: ClassVar[frozenset[str]] = frozenset({"magnitude"})
    reads_values: ClassVar[bool] = True

    def collector(self, site: Site) -> Collector:
        return Distribution()

    def level(self) -> float:
        return 1 - self.density / 2


#: What a token's scores are taken to be drawn from, and the threshold that then drops a share s of them.
LAWS = {
    "normal": "mean + std * Phi^-1(s)",
    "half_normal": "rms * Phi^-1((1 + s) / 2), for scores that are sizes of numbers around zero",
}


@part("gaussian")
@dataclass(frozen=True)
class Gaussian(Select):
    """Keep a token's scores above the (1 - density)-quantile of a Gaussian with the token's own moments (Gemma 3n).

    Nothing is sorted and nothing calibrated; how much is kept follows the density only where scores follow the law. A token
    whose scores are all equal is dropped whole by "normal".

    Parameters
    ----------
    law
        One of `LAWS`.
    """

    any_density: ClassVar[bool] = True

    density: float
    law: str = "normal"

    def __post_init__(self) -> None:
        fraction("density", self.density)
        if not isinstance(self.law, str) or self.law not in LAWS:
            raise unknown("law", self.law, LAWS)

    def __call__(self, scores: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.density == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        if self.law == "half_normal":
            bound = scores.square().mean(-1, keepdim=True).sqrt() * NormalDist().inv_cdf(1 - self.density / 2)
        else:
            spread = scores.std(-1, keepdim=True, correction=0)
            bound = scores.mean(-1, keepdim=True) + spread * NormalDist().inv_cdf(1 - self.density)
        return scores > bound

    def operations(self, site: Site) -> int:
        return 5 * site.width  # two moments, a comparison

    def kept(self, width: int) -> float:
        return self.density


@part("topk")
@dataclass(frozen=True)
class TopK(Select):
    """Keep exactly K = round(density * width) entries of every token, at least one.

    Ties are broken by position (the lower channel index wins), so that the mask does not depend
    on the machine's sort.
    """

    any_density: ClassVar[bool] = True

    density: float

    def __post_init__(self) -> None:
        fraction("density", self.density)

    def operations(self, site: Site) -> int:
        return 0 if self.density == 1 else 31 * site.width  # by halving, one for each bit of the k-th score; compiled, some six

    def count(self, width: int) -> int:
        """K for a site of this width."""
        return max(1, round(self.density * width))

    def __call__(self, scores: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return exact_topk(scores, self.count(scores.shape[-1]))

    def kept(self, width: int) -> float:
        return self.count(width) / width


def exact_topk(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of the k largest float32 (or narrower) scores of the last axis; ties go to the lower index.

    A NaN score ranks above every number, as in `torch.topk`, so broken inputs stay visible.
    """
    width = scores.shape[-1]
    if not 0 <= k <= width:
        raise refuse("k", k, f"a whole number in [0, {width}]")
    if k == width:
        return torch.ones_like(scores, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = kth_largest(scores, k)
    mask = ~(scores < bound)  # not "scores >= bound": a NaN must stay in
    if bound.isnan().any():
        mask = torch.where(bound.isnan(), scores.isnan(), mask)
    surplus = mask.sum(-1) > k
    if surplus.any():  # several entries equal the k-th, as is usual in bfloat16: the index decides among them
        mask[surplus] &= ~_ties_too_many(scores[surplus], bound[surplus], mask[surplus].sum(-1) - k)
    return mask


def _ties_too_many(scores: Tensor, bound: Tensor, surplus: Tensor) -> Tensor:
    """Mask of the last `surplus` [rows] entries of each row of scores [rows, width] that equal its bound [rows, 1]."""
    tied = scores == bound
    if bound.isnan().any():
        tied |= scores.isnan() & bound.isnan()
    row, place = tied.nonzero(as_tuple=True)  # few, and in ascending order within a row
    number = torch.bincount(row, minlength=len(scores))
    rank = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
    last = rank >= (number - surplus)[row]
    out = torch.zeros_like(tied)
    out[row[last], place[last]] = True
    return out


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest of the last axis, [..., 1]; NaN counts as larger than any number."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # NumPy's vectorised quickselect takes a tenth of the time of torch.topk here
        place = scores.shape[-1] - k
        ordered = np.partition(scores.detach().numpy(), place, axis=-1)
        return torch.from_numpy(ordered[..., place : place + 1].copy())
    return scores.kthvalue(scores.shape[-1] - k + 1, dim=-1, keepdim=True).values
