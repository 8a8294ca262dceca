"""Repairs: what makes up for the entries that were dropped, on z or on the outputs of the layers that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsity_lib.checks import fraction
from sparsity_lib.collectors import SecondMoment
from sparsity_lib.errors import refuse
from sparsity_lib.parts.base import Repair, as_float32, part
from sparsity_lib.sites import Site


@part("variance")
@dataclass(frozen=True)
class Variance(Repair):
    """x' * sqrt(Var(x) / Var(x')) for each token, variances over channels (VAR, arXiv 2509.22166).

    After a shift it scales what is left of z = x - m, not m; both variances are the same with one m a token. A token of
    which nothing is left stays so.
    """

    def operations(self, site: Site) -> int:
        return 7 * site.width  # two variances, a product

    def __call__(self, kept: Tensor, z: Tensor, mask: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        kept = as_float32(kept)
        before = as_float32(z).var(-1, keepdim=True, correction=0)
        after = kept.var(-1, keepdim=True, correction=0)
        ratio = torch.where(after > 0, before / torch.where(after > 0, after, 1), 1)
        return kept * ratio.clamp_min(1e-12).sqrt()  # the root of zero has no gradient


@part("output_scale")
@dataclass(frozen=True)
class OutputScale(Repair):
    """y = s * (W x') + b + t with a learned scale s and shift t for each output of each layer (LS, arXiv 2509.22166).

    The layer's own bias b, which no dropped entry touched, is not scaled. s = 1 and t = 0 until trained
    (`train.repairs.train_repairs`). Both fold into the layer, s into W's rows and t into b: where there is no b, that is
    one weight more an output.
    """

    on_outputs: ClassVar[bool] = True
    follows_mask: ClassVar[bool] = True

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {f"{name}_{i}": (outputs,) for i, (outputs, _) in enumerate(_shapes(site)) for name in ("scale", "offset")}

    def trained(self, site: Site) -> tuple[str, ...]:
        return tuple(self.shapes(site))

    def fit(self, collector: None, site: Site) -> dict[str, Tensor]:
        made = {"scale": torch.ones, "offset": torch.zeros}
        return {name: made[name.partition("_")[0]](shape) for name, shape in self.shapes(site).items()}

    def output(
        self, y: Tensor, dropped: Tensor, layer: nn.Module, reader: int, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        scale, offset = tensors[f"scale_{reader}"], tensors[f"offset_{reader}"]
        if layer.bias is not None:
            offset = offset + (1 - scale) * layer.bias
        return y * scale + offset

    def weights_read(self, site: Site) -> int:
        biases = [site.model.get_submodule(reader).bias for reader in site.column_readers]
        return sum(outputs for bias, (outputs, _) in zip(biases, _shapes(site), strict=True) if bias is None)


@part("low_rank")
@dataclass(frozen=True)
class LowRank(Repair):
    """y + U S V^T (x - x'): the dropped part goes through a low-rank stand-in of each weight (R-Sparse).

    U S V^T is the truncated singular value decomposition of the layer's weight. With `aware` it is the product of that
    rank with the least error on what is dropped on calibration text: the decomposition of W C^(1/2), C the second moment
    of x - x', multiplied by C^(-1/2).

    Parameters
    ----------
    rank_share
        Rank as a share of the smaller side of the weight, at least 1; each layer reads rank * (in + out) weights.
    aware
        Fit the product to what is dropped instead of to W alone (an extension).
    """

    on_outputs: ClassVar[bool] = True

    rank_share: float = 0.05
    aware: bool = False

    def __post_init__(self) -> None:
        fraction("rank_share", self.rank_share)
        if not isinstance(self.aware, bool):
            raise refuse("aware", self.aware, "true or false")

    @property
    def reads_dropped(self) -> bool:
        return self.aware

    @property
    def follows_mask(self) -> bool:
        return self.aware

    def rank(self, outputs: int, inputs: int) -> int:
        """Rank of the product for a weight [outputs, inputs]."""
        return max(1, round(self.rank_share * min(outputs, inputs)))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        found = {}
        for i, (outputs, inputs) in enumerate(_shapes(site)):
            rank = self.rank(outputs, inputs)
            found |= {f"left_{i}": (outputs, rank), f"right_{i}": (rank, inputs)}
        return found

    def collector(self, site: Site) -> SecondMoment | None:
        return SecondMoment(site.width) if self.aware else None

    def fit(self, collector: SecondMoment | None, site: Site) -> dict[str, Tensor]:
        root = inverse = None
        if collector is not None:
            root, inverse = _roots(collector.result())
        found = {}
        for i, reader in enumerate(site.column_readers):
            weight = site.input_weight(reader).detach().float().cpu()
            u, s, v = torch.linalg.svd(weight if root is None else (weight.double() @ root).float(), full_matrices=False)
            rank = self.rank(*weight.shape)
            right = s[:rank, None] * v[:rank]
            right = right if inverse is None else (right.double() @ inverse).float()
            found |= {f"left_{i}": u[:, :rank].contiguous(), f"right_{i}": right.contiguous()}
        return found

    def output(
        self, y: Tensor, dropped: Tensor, layer: nn.Module, reader: int, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        left, right = (tensors[f"{side}_{reader}"].to(dropped.dtype) for side in ("left", "right"))
        return y + dropped @ right.T @ left.T

    def weights_read(self, site: Site) -> int:
        return sum(self.rank(outputs, inputs) * (outputs + inputs) for outputs, inputs in _shapes(site))


def _shapes(site: Site) -> list[tuple[int, int]]:
    """(out, in) of the layers that read the site."""
    return [site.input_shape(reader) for reader in site.column_readers]


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^(1/2) and C^(-1/2) of a second moment, damped so that directions never seen stay finite."""
    moment = moment + (1e-6 * moment.diagonal().mean() + 1e-30) * torch.eye(len(moment), dtype=moment.dtype)
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values.max() * 1e-12)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
