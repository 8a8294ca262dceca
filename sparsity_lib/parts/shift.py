"""Shifts: entries are ranked and dropped as distances from a centre, which takes the place of those dropped.

The centre is static (SCAP's mode-centering, S-PTS), the token's own median (D-PTS), or learned (L-PTS); what it adds to
the layers' outputs goes into their biases (`fold`), or is the token's median times W's row sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsity_lib.checks import count, positive
from sparsity_lib.distribution import Distribution
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.parts.base import Transform, as_float32, part
from sparsity_lib.parts.select import kth_largest
from sparsity_lib.sites import GATE, Site

#: What the centre is a statistic of, over calibration activations.
CENTERS = {
    "mean": "their mean",
    "median": "their median",
    "mode": "the peak of their Gaussian kernel density estimate",
}


@part("shift")
@dataclass(frozen=True)
class Shift(Transform):
    """z = x - m: a dropped entry becomes m, so that W x = W z + W m with W m static (SCAP, arXiv 2412.07174, eqs. 4 to 6).

    By the median it is S-PTS of arXiv 2509.22166.

    One m a site, as in the paper; constant activations are their own centre by any statistic. z is float32 whatever the
    model's dtype: a small difference of two bfloat16 numbers would have few digits left.

    Parameters
    ----------
    by
        One of `CENTERS`.
    bandwidth
        Of `mode`: the kernel's deviation in units of Scott's rule, std * n**(-1/5) with n at most 200,000. SCAP's release
        takes 0.5, on a sample of that size.
    grid
        Of `mode`: points of the density within one deviation of the kernel.
    per_channel
        One m a channel instead of one a site (an extension; mean and median only).
    """

    by: str = "mode"
    bandwidth: float = 0.5
    grid: int = 32
    per_channel: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or self.by not in CENTERS:
            raise unknown("by", self.by, CENTERS)
        positive("bandwidth", self.bandwidth)
        count("grid", self.grid, minimum=4)
        if not isinstance(self.per_channel, bool):
            raise refuse("per_channel", self.per_channel, "true or false")
        if self.per_channel and self.by == "mode":
            raise refuse("by of a shift per channel", self.by, "mean or median", "by='median'")

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"shift": (site.width if self.per_channel else 1,)}

    def operations(self, site: Site) -> int:
        return site.width

    def collector(self, site: Site) -> Distribution:
        return Distribution(site.width if self.per_channel else None, histogram=self.by != "mean")

    def fit(self, collector: Distribution, site: Site) -> dict[str, Tensor]:
        if self.by == "mode":
            return {"shift": torch.tensor([collector.mode(self.bandwidth, self.grid)], dtype=torch.float32)}
        return {"shift": (collector.center() if self.by == "mean" else collector.quantile(0.5)).float()}

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(x) - tensors["shift"]

    def inverse(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return z + tensors["shift"]


@part("token_shift")
@dataclass(frozen=True)
class TokenShift(Transform):
    """z = x - m with m the token's own median over channels: D-PTS of arXiv 2509.22166, prune(x - m) + m.

    Of an even number of channels the lower of the two middle ones, as `torch.median` has it. Nothing is fitted. At run
    time the shift costs the layers' row sums: W x' = W z' + m (W 1), one number an output that joins the biases.
    """

    def of_token(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**tensors, "median": lower_median(as_float32(x))}

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(x) - tensors["median"]

    def inverse(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return z + tensors["median"]


def lower_median(x: Tensor) -> Tensor:
    """The median of the last axis [..., 1], the lower of two middle ones; a gradient flows to the entry it is."""
    if x.requires_grad and torch.is_grad_enabled():
        return x.median(-1, keepdim=True).values
    return kth_largest(x, x.shape[-1] // 2 + 1)


@part("learned_shift")
@dataclass(frozen=True)
class LearnedShift(Transform):
    """z = x - m with a learned m per channel: L-PTS of arXiv 2509.22166. `fold` puts W m into the biases.

    `train.repairs.train_repairs` learns m block by block; as fitted it is `start`.

    Parameters
    ----------
    start
        "zero" (as if there were no shift) or "median" (each channel's on calibration text).
    """

    follows_mask: ClassVar[bool] = True

    start: str = "zero"

    def __post_init__(self) -> None:
        if not isinstance(self.start, str) or self.start not in ("zero", "median"):
            raise unknown("start", self.start, ("zero", "median"))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"shift": (site.width,)}

    def trained(self, site: Site) -> tuple[str, ...]:
        return ("shift",)

    def collector(self, site: Site) -> Distribution | None:
        return Distribution(site.width) if self.start == "median" else None

    def fit(self, collector: Distribution | None, site: Site) -> dict[str, Tensor]:
        return {"shift": torch.zeros(site.width) if collector is None else collector.quantile(0.5).float()}

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(x) - tensors["shift"]

    def inverse(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return z + tensors["shift"]


def fold(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the shift adds to the biases of the layers that read `site`: reader -> W m, float32 [out].

    With it, y = W z + (b + W m) reads only the columns of entries kept; layers without a bias get one.

    Raises
    ------
    SparsityError
        At the gate, whose entries are no layer's input before they are multiplied, and at experts.
    """
    if site.kind == GATE or site.experts:
        what = "a gate's output" if site.kind == GATE else "an expert's input"
        raise SparsityError(f"The shift of {what} (site {site.name}) has no bias to go to. Fix: install(model, plan).")
    shift = tensors["shift"]
    folded = {}
    for reader in site.column_readers:
        weight = site.input_weight(reader).detach().float()
        folded[reader] = weight @ shift.to(weight.device).expand(site.width)
    return folded
