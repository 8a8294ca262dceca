"""Transforms: the basis in which entries are ranked and dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_lib.checks import positive
from sparsity_lib.collectors import Collector, SecondMoment
from sparsity_lib.parts.base import Transform, part
from sparsity_lib.sites import Site


@part("identity")
@dataclass(frozen=True)
class Identity(Transform):
    """z = x."""


@part("rotate")
@dataclass(frozen=True)
class Rotate(Transform):
    """z = Q^T x with Q the eigenvectors of sum_t x_t x_t^T (LaRoSA, arXiv 2507.01299, section 3).

    The second moment is decomposed in float64, after `damping` times its mean diagonal was added to its
    diagonal as in the released code; in exact arithmetic that changes eigenvalues only, never the basis.
    Entries are dropped in z, and x' = Q z' goes to the layer: numerically the same as absorbing Q into the
    weights. Absorbed, the rotation costs no weights; at run time it reads `width**2` of them for each token.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        positive("damping", self.damping)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"rotation": (site.width, site.width)}

    def collector(self, site: Site) -> Collector:
        return SecondMoment(site.width)

    def fit(self, collector: Collector, site: Site) -> dict[str, Tensor]:
        moment = collector.result()
        moment = moment + self.damping * moment.diagonal().mean() * torch.eye(site.width, dtype=moment.dtype)
        _, vectors = torch.linalg.eigh(moment)
        vectors = vectors.flip(-1)  # eigh sorts upwards; the strongest direction first reads better
        # An eigenvector's sign is arbitrary: fix it, so that two machines store the same rotation.
        strongest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return {"rotation": (vectors * strongest.sign()).float().contiguous()}

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return x @ tensors["rotation"].to(x.dtype)

    def inverse(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return z @ tensors["rotation"].to(z.dtype).T

    def gradient(self, grad: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.forward(grad, tensors)  # Q is orthogonal: dL/dz = Q^T dL/dx

    def weights_read(self, site: Site) -> int:
        return site.width**2
