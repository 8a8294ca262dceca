"""The budget: what a batch may cost, how that target moves along training, and the loss of exceeding it.

    L = min(R(B) - R_target, 0)^2,    R(B) = base cost of the batch / its cost under the masks        (section 3.6)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sparsity_lib.checks import count, positive
from sparsity_lib.cwic.convert import Registry
from sparsity_lib.errors import SparsityError, refuse, unknown

COUNTS = {
    "active": "weights a token reads, norms and its embedding row included, by the rules of `accounting`",
    "flops": "operations: two a weight of a matrix, and attention's products of queries, keys and values",
}


@dataclass(frozen=True)
class Budget:
    """The target ratio over the steps of a run, and what it weighs in the loss.

    Parameters
    ----------
    final
        The ratio to end at, above 1: 3 means a third of the dense cost.
    warmup
        Steps over which the target rises from `start` to `final + margin` in a line; 0: at once.
    start, margin
        Where it starts, and what is added so that the ratio itself is reached.
    weight
        lambda: the loss is the distillation's plus this times L.
    counts
        One of `COUNTS`.
    head_limit
        Stop the gradient of the head's cost while the head's own ratio is at least this; None: never.
    """

    final: float
    warmup: int
    start: float = 1.05
    margin: float = 0.05
    weight: float = 10.0
    counts: str = "active"
    head_limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("final", "start", "weight"):
            positive(name, getattr(self, name))
        for name in ("final", "start"):
            if getattr(self, name) < 1:
                fix = "3.0 asks for a third of the dense model's cost"
                raise refuse(f"target ratio ({name})", getattr(self, name), "a number of at least 1", fix)
        if self.margin:
            positive("margin", self.margin)
        count("warmup", self.warmup, minimum=0)
        if self.final + self.margin < self.start:
            raise refuse("start", self.start, f"a number up to the final target {self.final + self.margin}")
        if self.counts not in COUNTS:
            raise unknown("counts", self.counts, COUNTS)
        if self.head_limit is not None and positive("head_limit", self.head_limit) < 1:
            raise refuse("head_limit", self.head_limit, "a number of at least 1, or None")

    def target(self, step: int) -> float:
        """R_target at `step`, counted from 0."""
        end = self.final + self.margin
        return end if step >= self.warmup else self.start + (end - self.start) * step / self.warmup

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def active(steps: int, final: float = 6.0, **changes) -> Budget:
    """The active-parameter version for a run of `steps`: 1.05 to final + 0.05 over 15,000 of 18,000 steps, weight 10."""
    count("steps", steps)
    made = {"final": final, "warmup": round(steps * 15_000 / 18_000), "start": min(1.05, final)}
    return Budget(**{**made, **changes})


def flops(steps: int, final: float = 6.0, **changes) -> Budget:
    """The FLOP version for a run of `steps`: 1.5 to final over 6,000 of 7,000 steps, weight 1, the head limited to 10."""
    count("steps", steps)
    made = {"final": final, "warmup": round(steps * 6_000 / 7_000), "start": min(1.5, final), "margin": 0.0, "weight": 1.0,
            "counts": "flops", "head_limit": 10.0}
    return Budget(**{**made, **changes})


#: Name -> schedule, one for each version of the paper.
PRESETS = {"active": active, "flops": flops}
#: Name -> the factor eta on the thresholds' learning rate that this version of the paper used.
ETA = {"active": 1.0, "flops": 10.0}


@dataclass(frozen=True)
class Spent:
    """What a batch cost. used carries gradients; ratio is base / used of the whole model, head_ratio of its head alone."""

    base: float
    used: Tensor
    head_ratio: float | None

    @property
    def ratio(self) -> Tensor:
        return self.base / self.used


def spent(registry: Registry, costs: Mapping[str, Tensor], budget: Budget, *, valid: Tensor | None = None,
          attention: float = 0.0) -> Spent:
    """Add up the costs of one batch, over all tokens that are `valid` and over all processes.

    Parameters
    ----------
    costs
        Layer -> weights read by each token, as `Registry.take_costs` gives them.
    valid
        Tokens that are no padding, boolean [tokens].
    attention
        Operations of attention's own products for a token, which no mask changes; used where FLOPs are counted.

    Raises
    ------
    SparsityError
        If a layer's cost is missing: it was not run, or its costs were taken already.
    """
    missing = [name for name in registry.layers if name not in costs]
    if missing:
        raise SparsityError(f"{missing[0]} reported no cost. Fix: one forward of the whole model before each call.")
    some = next(iter(costs.values()))
    chosen = torch.ones(len(some), device=some.device) if valid is None else valid.float()
    tokens = chosen.sum()
    used = {name: (cost * chosen).sum() for name, cost in costs.items()}
    head_ratio = None
    if registry.head is not None:
        head_base = registry.layers[registry.head].dense_cost * tokens
        head_ratio = float(_everywhere(head_base) / _everywhere(used[registry.head].detach()).clamp_min(1))
        if budget.head_limit is not None and head_ratio >= budget.head_limit:
            used[registry.head] = used[registry.head].detach()
    covered = sum(layer.dense_cost for layer in registry.layers.values())
    if budget.counts == "active":
        always, each = float(registry.always), 1.0
    else:
        uncovered = sum(linear.weights for linear in registry.sites.linears) + _head_weights(registry) - covered
        always, each = 2.0 * uncovered + attention, 2.0
    everything = torch.stack(list(used.values())).double().sum() * each + always * tokens.double()
    base = _everywhere(tokens.double()) * (covered * each + always)
    return Spent(float(base), _everywhere(everything), head_ratio)


def budget_loss(ratio: Tensor, target: float) -> Tensor:
    """min(R - R_target, 0)^2: nothing once the target is reached."""
    return (ratio - target).clamp(max=0).square()


def _head_weights(registry: Registry) -> int:
    model = next(iter(registry.sites.sites.values())).model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return 0 if head is None else head.weight.numel()


def _everywhere(part: Tensor) -> Tensor:
    """The sum over processes, with a gradient that comes out right after the processes' gradients are averaged."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return part
    total = part.detach().clone()
    dist.all_reduce(total)
    ours = part * dist.get_world_size()
    return total + ours - ours.detach()
