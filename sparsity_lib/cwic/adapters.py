"""Low-rank adapters that a granular product sees as part of its weight, so that merging them changes nothing.

Adapters beside a layer, as usual, would read inputs that the layer masks; here W + s B A is what is masked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsity_lib.checks import count, positive
from sparsity_lib.cwic.convert import Registry
from sparsity_lib.errors import SparsityError


class LowRank(nn.Module):
    """W -> W + (alpha / rank) B A with A [rank, in] random and B [out, rank] zero at the start (Hu et al. 2021)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.factor = alpha / rank
        self.a = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.factor * (self.b @ self.a)).to(weight.dtype)


def add_adapters(model: nn.Module, registry: Registry, rank: int = 16, alpha: float = 32.0, seed: int = 0) -> list[nn.Module]:
    """Put adapters on all matrices of the blocks (up and down included, the head not); returns them.

    Weights are frozen, adapters require gradients. The random half is the same for the same seed. Adapters that are there
    already, as after an interrupted run, stay; SparsityError if theirs is another rank.
    """
    count("rank", rank)
    positive("alpha", alpha)
    made = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for linear in registry.sites.linears:
            module = model.get_submodule(linear.name)
            if not parametrize.is_parametrized(module, "weight"):
                module.weight.requires_grad_(False)
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha))
            adapter = module.parametrizations.weight[0]
            if not isinstance(adapter, LowRank) or len(adapter.a) != rank:
                raise SparsityError(f"{linear.name} has another adapter already. Fix: merge_adapters(model) first.")
            made.append(adapter.requires_grad_(True))
    return made


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Replace each adapted weight by W + s B A, as a new tensor: a teacher that shares W keeps it."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], LowRank):
            merged = module.weight.detach().clone()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight = nn.Parameter(merged, requires_grad=False)
