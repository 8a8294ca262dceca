"""How something is trained: plain data, the same for everything that is compared."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sparsity_lib.checks import count, fraction, positive
from sparsity_lib.errors import refuse, unknown

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainRecipe:
    """AdamW with linear warm-up and cosine decay.

    Parameters
    ----------
    steps
        Updates of the weights.
    batch
        Rows an update, over all processes and accumulated pieces.
    learning_rate
        At its peak; it ends at `floor` times that.
    warmup
        Steps until the peak.
    weight_decay
        Of matrices; vectors (norms, biases) have none.
    clip
        Largest norm of the gradient.
    accumulation
        Pieces a batch is computed in, where it does not fit at once.
    precision
        "fp32" computes in the weights' own precision, "bf16" products in bfloat16 (weights and moments stay float32).
    passes
        How often the data may be seen; more steps than that are refused.
    seed
        Of the order of the rows, and of all that is random inside the module and its loss.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 0
    floor: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    accumulation: int = 1
    precision: str = "fp32"
    passes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch": 1, "accumulation": 1, "passes": 1, "warmup": 0, "seed": 0}.items():
            count(name, getattr(self, name), minimum=least)
        for name in ("learning_rate", "clip"):
            positive(name, getattr(self, name))
        fraction("floor", self.floor, zero=True)
        fraction("weight_decay", self.weight_decay, zero=True)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise refuse("betas", self.betas, "two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(fraction("betas", beta, zero=True, one=False) for beta in self.betas))
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.batch % self.accumulation:
            raise refuse("accumulation", self.accumulation, f"a divisor of the batch of {self.batch} rows")
        if self.warmup >= self.steps > 1:
            raise refuse("warmup", self.warmup, f"fewer than the {self.steps} steps")

    def rate(self, step: int) -> float:
        """Share of the learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * (0.5 * (1 + math.cos(math.pi * done)))

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "betas": list(self.betas)}
