"""Granular models (CWIC) as a decoder sees them: each stripe of a projection, and of the head, with a rule of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity_lib.cwic.convert import registry_of
from sparsity_lib.cwic.layers import CWICLinear
from sparsity_lib.cwic.statistics import Thresholds
from sparsity_lib.decode.rules import Choice
from sparsity_lib.decode.sources import ModelSource
from sparsity_lib.sites import GATE


@dataclass(frozen=True)
class Granular:
    """A granular projection for operators: what |x - shift| has to exceed, [stripes, in]; shift [in]; bias b + W m, [out].

    width: outputs a stripe, the last takes what is left.
    """

    weight: Tensor
    thresholds: Tensor
    shift: Tensor
    bias: Tensor
    width: int


@torch.no_grad()
def limits(sparsity: Thresholds) -> Tensor:
    """theta s, float32 [stripes, in], moved to the next smaller number.

    CWIC keeps |x - m| >= theta s; operators keep what is above a threshold.
    """
    _, scale, _ = sparsity.rule()
    return torch.nextafter(sparsity.theta * scale, torch.tensor(-torch.inf, device=scale.device)).contiguous()


@torch.no_grad()
def folded(layer: CWICLinear) -> Granular:
    """A granular layer with the constant part of its product in the bias."""
    mean, _, _ = layer.sparsity.rule()
    constant = layer.weight.float() @ mean
    bias = constant if layer.bias is None else layer.bias.float() + constant
    return Granular(layer.weight.detach(), limits(layer.sparsity), mean, bias, layer.stripe)


class GranularSource(ModelSource):
    """Weights and thresholds of a model that `cwic.convert` made granular."""

    linears = (nn.Linear, CWICLinear)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._registry = registry_of(model)

    def granular(self, layer: int, name: str) -> Granular | None:
        found = self._linear(layer, name)
        return folded(found) if isinstance(found, CWICLinear) else None

    def granular_head(self) -> Granular | None:
        found = self._registry.head
        return None if found is None else folded(self._registry.layers[found])

    def choice(self, layer: int, site: str, width: int) -> Choice | None:
        """The neuron mask; inputs are dropped by stripe."""
        if site != GATE:
            return None
        return Choice(threshold=limits(self._registry.layers[self._registry.sites.sites[layer, GATE].act].sparsity)[0])
