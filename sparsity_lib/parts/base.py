"""What every part of a recipe has in common: a name, checked parameters, JSON, and fitted tensors.

A recipe is a sentence made of parts (transform, score, select, repair). A part is a frozen
dataclass: its fields are plain data, so a recipe goes to JSON and back; whatever it learns from
calibration text it returns as tensors, so a plan goes to safetensors and back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.sites import GATE

if TYPE_CHECKING:
    from sparsity_lib.collectors import Collector
    from sparsity_lib.sites import Site

#: role -> kind -> class; filled by the `part` decorator.
REGISTRY: dict[str, dict[str, type[Part]]] = {"transform": {}, "score": {}, "select": {}, "repair": {}}


@dataclasses.dataclass(frozen=True)
class Part:
    """Base class of all parts. Subclasses add fields and the methods of their role."""

    kind: ClassVar[str]
    role: ClassVar[str]
    #: Kinds of sites the part makes sense at; empty means any.
    only_sites: ClassVar[frozenset[str]] = frozenset()
    #: Whether its tensors hold only for the selection they were fitted with.
    follows_mask: ClassVar[bool] = False

    def check(self, site: Site) -> None:
        """Raise SparsityError where the part cannot work at `site` (say, N:M on a width not divisible by M)."""

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors the part keeps for `site`; known before anything is fitted."""
        return {}

    def collector(self, site: Site) -> Collector | None:
        """The statistic to stream over calibration text, or None if nothing is needed."""
        return None

    def fit(self, collector: Collector | None, site: Site) -> dict[str, Tensor]:
        """Turn the streamed statistic into the tensors announced by `shapes`."""
        return {}

    def operations(self, site: Site) -> int:
        """Operations a token that the part adds at run time, products with the weights of `weights_read` left out."""
        return 0

    def trained(self, site: Site) -> tuple[str, ...]:
        """Names of those tensors that training may go on to change (`train.repairs`); `fit` gives where it starts."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Plain data: {"kind": ..., field: value, ...}."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def key(self) -> str:
        """A string equal for equal parts; used to share statistics between recipes."""
        return f"{self.role}:{json.dumps(self.to_json(), sort_keys=True)}"


class Transform(Part):
    """x -> z and back. z is where scores are taken and entries are dropped."""

    role = "transform"

    def of_token(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`tensors`, joined by what the transform takes from each token x itself (say, its median).

        The other methods are given the result; what is fitted alone is enough for transforms that look at no token.
        """
        return tensors

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return x

    def inverse(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return z

    def gradient(self, grad: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """dL/dz from dL/dx, for scores that need gradients in the transformed basis."""
        return grad

    def weights_read(self, site: Site) -> int:
        """Extra weights read per token if the transform is carried out at run time, not absorbed."""
        return 0


class Score(Part):
    """z -> one number per entry, in float32; larger means kept first."""

    role = "score"
    #: Whether it ranks a sequence's sparse tokens by those before them, which are left dense (`prompt`).
    of_prompt: ClassVar[bool] = False
    #: Whether it needs nothing of the token itself, so that a gate site's neurons are left out whole, gate rows included.
    beforehand: ClassVar[bool] = False

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def operations(self, site: Site) -> int:
        return site.width * (1 + bool(self.shapes(site)))  # a size, and a product with what was fitted

    def prompt(self, z: Tensor) -> Mapping[str, Tensor]:
        """What the score keeps of the dense first part of every sequence, z [batch, tokens, width]: tensors by name."""
        return {}


class Select(Part):
    """scores -> boolean mask of the entries kept."""

    role = "select"
    #: Kinds of scores it works with; empty means any.
    only_scores: ClassVar[frozenset[str]] = frozenset()
    #: Whether it is fitted to z itself and not to scores.
    reads_values: ClassVar[bool] = False
    #: Whether nothing it was fitted to depends on its density, so that a plan can be used at another.
    any_density: ClassVar[bool] = False

    def __call__(self, scores: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def operations(self, site: Site) -> int:
        return site.width  # a comparison an entry

    def kept(self, width: int) -> float:
        """Share of entries kept by design, before anything is measured."""
        raise NotImplementedError

    def with_density(self, density: float) -> Select:
        """The same selection at another density."""
        return dataclasses.replace(self, density=density)  # type: ignore[call-arg]


class Repair(Part):
    """(kept z, original z, mask) -> z that makes up for what was dropped; or, after the layers, y -> y."""

    role = "repair"
    #: Whether it changes what the layers that read the site put out (`output`), and not z (`__call__`).
    on_outputs: ClassVar[bool] = False
    #: Whether its collector is shown what is dropped, x - x' [..., width], and not z.
    reads_dropped: ClassVar[bool] = False

    def check(self, site: Site) -> None:
        if self.on_outputs and (site.kind == GATE or site.experts):
            where = "an expert site" if site.experts else "the gate, which no layer reads as it is"
            raise refuse(f"repair at {where}", self.kind, "a repair of z", "leave it out, or use another site")

    def __call__(self, kept: Tensor, z: Tensor, mask: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def output(
        self, y: Tensor, dropped: Tensor, layer: nn.Module, reader: int, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """What takes the place of y [..., out], which `layer`, number `reader` of the site, made of x' = x - dropped.

        The layer's own bias, where it has one, is contained in y.
        """
        raise NotImplementedError

    def weights_read(self, site: Site) -> int:
        """Weights read per token on top of the layers' own."""
        return 0


def part(kind: str):
    """Register a Part under the name it has in recipes."""

    def register(cls: type[Part]) -> type[Part]:
        if kind in REGISTRY[cls.role]:
            raise SparsityError(f"{cls.role} {kind!r} is registered twice")
        cls.kind = kind
        REGISTRY[cls.role][kind] = cls
        return cls

    return register


def from_json(role: str, data: object) -> Part:
    """Build a part from its plain data, refusing unknown kinds and fields.

    Raises
    ------
    SparsityError
        Naming the kind or field that is unknown, or the value that is out of range.
    """
    if not isinstance(data, Mapping) or "kind" not in data:
        raise refuse(role, data, 'an object with a "kind"', 'write {"kind": "..."}')
    kinds = REGISTRY[role]
    if not isinstance(data["kind"], str) or data["kind"] not in kinds:
        raise unknown(f"{role} kind", data["kind"], kinds)
    cls = kinds[data["kind"]]
    known = {field.name: field for field in dataclasses.fields(cls)}
    given = {name: value for name, value in data.items() if name != "kind"}
    for name in given:
        if name not in known:
            raise unknown(f"parameter of {role} {data['kind']!r}", name, known)
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in given]
    if missing:
        raise SparsityError(f"{role} {data['kind']!r} lacks the parameter {missing[0]!r}. Fix: give it a value.")
    return cls(**given)


def as_float32(x: Tensor) -> Tensor:
    """Scores are compared in float32 whatever the model's dtype, so that bf16 ties are rare."""
    return x if x.dtype == torch.float32 else x.float()
