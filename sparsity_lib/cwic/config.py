"""How a model is made granular: plain data with a JSON round trip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsity_lib.checks import count, fraction, positive
from sparsity_lib.cwic.kernel_functions import RECTANGLE, check_kernel
from sparsity_lib.errors import SparsityError, refuse, unknown

#: Roles of matrices that a stripe width can be given for.
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "in_proj", "out_proj", "head")
STATISTICS = {
    "moments": "mean and standard deviation of a batch, as the papers have it",
    "released": "geometric median, and the mean distance from it over sqrt(2 / pi), as released code has it",
}


@dataclass(frozen=True)
class CWICConfig:
    """Stripes, statistics and gradients of every granular layer of a model.

    Parameters
    ----------
    stripe
        Outputs that share a mask: one width for all matrices, or role -> width (roles left out: 1 stripe); None: 1 stripe
        everywhere, which is plain column sparsity.
    uneven
        Let the last stripe be narrower where the width does not divide the outputs; else that is refused.
    bandwidth
        alpha: the pseudo-derivative's width eps is alpha standard deviations of the input.
    kernel
        K of the pseudo-derivative (1 / eps) K(z / eps), one of `kernel_functions.KERNELS`.
    momentum
        beta of the running statistics.
    normalise
        Thresholds in standard deviations from the mean; False: plain |x| against thresholds (an ablation).
    straight_through
        x gets gradients as if nothing were masked; False: those of the masked product (an ablation).
    statistics
        One of `STATISTICS`.
    head
        Make the language-model head granular too.
    """

    stripe: int | None | Mapping[str, int] = None
    uneven: bool = False
    bandwidth: float = 0.1
    kernel: str = RECTANGLE
    momentum: float = 0.99
    normalise: bool = True
    straight_through: bool = True
    statistics: str = "moments"
    head: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stripe, Mapping):
            for role, width in self.stripe.items():
                if role not in ROLES:
                    raise unknown("role of a stripe", role, ROLES)
                count(f"stripe of {role}", width)
            object.__setattr__(self, "stripe", dict(self.stripe))
        elif self.stripe is not None:
            count("stripe", self.stripe)
        positive("bandwidth", self.bandwidth)
        check_kernel(self.kernel)
        fraction("momentum", self.momentum, zero=True, one=False)
        for name in ("uneven", "normalise", "straight_through", "head"):
            if not isinstance(getattr(self, name), bool):
                raise refuse(name, getattr(self, name), "True or False")
        if not isinstance(self.statistics, str) or self.statistics not in STATISTICS:
            raise unknown("statistics", self.statistics, STATISTICS)

    def width(self, role: str, outputs: int) -> int:
        """Outputs a stripe in a matrix of this role.

        Raises
        ------
        SparsityError
            If the width does not divide the outputs and `uneven` is off.
        """
        found = self.stripe.get(role) if isinstance(self.stripe, Mapping) else self.stripe
        if found is None:
            return outputs
        if outputs % found and not self.uneven:
            near = [w for w in range(1, outputs + 1) if outputs % w == 0]
            best = min(near, key=lambda w: abs(w - found))
            raise refuse(
                f"stripe of {role}", found, f"a divisor of its {outputs} outputs",
                f"{best}, a width a role (stripe={{'{role}': {best}, ...}}), or uneven=True for a narrower last stripe")
        return min(found, outputs)

    def to_json(self) -> dict[str, Any]:
        """Plain data. A kernel is named where it is not the rectangle: what was written before there was a choice (checkpoints
        of running trainings among it) stays equal to what is written now."""
        found = dataclasses.asdict(self)
        if self.kernel == RECTANGLE:
            del found["kernel"]
        return found

    @staticmethod
    def from_json(data: object) -> CWICConfig:
        """Read what `to_json` wrote; raises SparsityError for anything unknown or out of range."""
        if not isinstance(data, Mapping):
            raise refuse("CWIC configuration", data, "an object")
        known = [field.name for field in dataclasses.fields(CWICConfig)]
        for name in data:
            if name not in known:
                raise unknown("field of a CWIC configuration", name, known)
        try:
            return CWICConfig(**data)
        except TypeError as error:
            raise SparsityError(f"The CWIC configuration is broken: {error}.") from None
