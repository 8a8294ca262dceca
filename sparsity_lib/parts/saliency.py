"""CLAWS' score: the gate activation times a static saliency read off calibration gradients.

Zeroing g_j changes the loss by about g_j * dL/dg_j (first-order Taylor). The gradient is unknown at
run time, but its typical size can be stored per neuron: c_j. The abstract says "Fisher-calibrated"
and no more; the Fisher reading is c_j = sqrt(E[(dL/dg_j)^2]). Gradients have heavy tails (a first
token or BOS can carry ten times the others'), so robust readings are offered beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_lib.checks import positive
from sparsity_lib.collectors import Collector, GradientSize
from sparsity_lib.errors import refuse, unknown
from sparsity_lib.parts.base import Score, as_float32, part
from sparsity_lib.sites import Site

#: How |dL/dz_j| is averaged over the tokens of the calibration text.
STATISTICS = {
    "rms": "sqrt(E[grad^2]), the Fisher reading",
    "mean": "E[|grad|]",
    "median": "the median of |grad|",
    "product_rms": "sqrt(E[(z grad)^2] / E[z^2]): gradients weighted by how far the neuron fires",
}


@part("saliency")
@dataclass(frozen=True)
class Saliency(Score):
    """|z_j| * c_j with c_j = statistic of |dL/dz_j| to a power, scaled to mean 1 (CLAWS).

    Parameters
    ----------
    statistic
        One of `STATISTICS`.
    power
        c_j ** power; 1 is the full multiplier, 0 is none (CATS' ranking).
    skip_first
        Leave each sequence's first token out of the statistic.
    """

    statistic: str = "rms"
    power: float = 1.0
    skip_first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.statistic, str) or self.statistic not in STATISTICS:
            raise unknown("statistic", self.statistic, STATISTICS)
        positive("power", self.power)
        if not isinstance(self.skip_first, bool):
            raise refuse("skip_first", self.skip_first, "true or false")

    def check(self, site: Site) -> None:
        if self.skip_first and site.experts:  # experts see tokens without their place in the sequence
            raise refuse("skip_first at an expert site", True, "false", "use a variant that reads all tokens")

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"saliency": (site.width,)}

    def collector(self, site: Site) -> Collector:
        return GradientSize(site.width, skip_first=self.skip_first, median=self.statistic == "median")

    def fit(self, collector: Collector, site: Site) -> dict[str, Tensor]:
        raw = collector.result()[self.statistic].double()
        # A neuron that never had a gradient ranks last, but stays above zero so that ties stay rare.
        floor = raw[raw > 0].min() if (raw > 0).any() else torch.tensor(1.0, dtype=raw.dtype)
        shaped = (raw.clamp_min(floor) / raw.max().clamp_min(floor)) ** self.power  # at most 1: no power overflows
        return {"saliency": (shaped / shaped.mean()).float()}

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(z).abs() * tensors["saliency"]
