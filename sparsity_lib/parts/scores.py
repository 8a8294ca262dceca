"""Scores: what makes one entry worth more than another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsity_lib.checks import count
from sparsity_lib.errors import refuse
from sparsity_lib.parts.base import Score, as_float32, part
from sparsity_lib.sites import GATE, Site


@part("magnitude")
@dataclass(frozen=True)
class Magnitude(Score):
    """|z_i|: CATS, TEAL, SCAP, LaRoSA."""

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(z).abs()


@part("oracle")
@dataclass(frozen=True)
class Oracle(Score):
    """|g_j u_j|, the magnitude that truly reaches the down projection.

    Not a method: u costs the rows one wants to skip. It bounds what any gate-side score can reach.
    """

    only_sites: ClassVar[frozenset[str]] = frozenset({GATE})
    #: The mask is taken on h = g * u instead of g; the weights it skips are the gate site's.
    on_product: ClassVar[bool] = True

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(z).abs()


@part("random")
@dataclass(frozen=True)
class Random(Score):
    """A number drawn for every token and entry: the floor that any score must beat.

    Drawn by hashing the entry's own bits with its index, so that it needs no state and does not
    depend on how tokens are batched.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if count("seed", self.seed, minimum=0) >= 2**32:
            raise refuse("seed", self.seed, "a whole number below 2**32")

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        bits = as_float32(z).contiguous().view(torch.int32).long()
        index = torch.arange(z.shape[-1], device=z.device)
        mixed = (bits * 2654435761 + index * 40503 + self.seed * 97 + 12345) & 0xFFFFFFFF
        for shift in (15, 13):  # a xorshift-multiply finaliser: neighbouring bits must not stay neighbours
            mixed = ((mixed ^ (mixed >> shift)) * 2246822519) & 0xFFFFFFFF
        return (mixed >> 8).float()


@part("column_norm")
@dataclass(frozen=True)
class ColumnNorm(Score):
    """|z_i| * ||W[:, i]||_2, with W the stacked weights that read the site (WINA, arXiv 2505.19427).

    At the gate site the norm is that of the neuron's down-projection column.
    """

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"norm": (site.width,)}

    def check(self, site: Site) -> None:
        if site.experts:
            raise refuse("score at an expert site", self.kind, "a score without weight norms", "use magnitude")

    def fit(self, collector: None, site: Site) -> dict[str, Tensor]:
        square = sum(site.input_weight(reader).detach().float().square().sum(0) for reader in site.column_readers)
        return {"norm": square.sqrt().cpu()}

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(z).abs() * tensors["norm"]


@part("value")
@dataclass(frozen=True)
class Value(Score):
    """z_i itself, with its sign: what is below zero goes first (Gemma 3n's gate)."""

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_float32(z)


@part("relative")
@dataclass(frozen=True)
class Relative(Score):
    """s_j = || (h_tj / ||h_t||)_t ||_2 over the prompt's tokens t, h = g * u (GRIFFIN, arXiv 2404.01365, section 4).

    One ranking a sequence, known before any of its later tokens: the neurons left out are left out whole, rows of W_gate
    and W_up and columns of W_down. A token of which nothing fires counts for nothing.
    """

    only_sites: ClassVar[frozenset[str]] = frozenset({GATE})
    on_product: ClassVar[bool] = True
    of_prompt: ClassVar[bool] = True
    beforehand: ClassVar[bool] = True

    def check(self, site: Site) -> None:
        if site.experts:
            raise refuse("score at an expert site", self.kind, "a score that ranks every token by itself", "use magnitude")

    def operations(self, site: Site) -> int:
        return 0  # once a prompt

    def prompt(self, z: Tensor) -> Mapping[str, Tensor]:
        z = as_float32(z)
        size = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return {"relative": torch.linalg.vector_norm(z / size, dim=-2, keepdim=True)}

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["relative"].expand(z.shape)
