"""A repair that reads in full the outputs that look most important: a preview first, the rest where it matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsity_lib.checks import fraction
from sparsity_lib.errors import refuse
from sparsity_lib.parts.base import Repair, part
from sparsity_lib.parts.select import TopK, exact_topk
from sparsity_lib.sites import HEAD_IN, Site


@part("refine")
@dataclass(frozen=True)
class Refine(Repair):
    """y_v = W_v x for the K = share * outputs largest y_v = W_v x', and W_v x' for all others, with x' what the site kept.

    At the head, where few of the outputs carry nearly all probability: SVD-softmax's second pass (Shim et al. 2017, section
    3), after a preview that reads the inputs which the site keeps instead of a fixed leading part of them.

    Parameters
    ----------
    share
        Share of the outputs that are read in full, (0, 1]; at least one.
    """

    only_sites: ClassVar[frozenset[str]] = frozenset({HEAD_IN})
    on_outputs: ClassVar[bool] = True

    share: float = 0.02

    def __post_init__(self) -> None:
        fraction("share", self.share)

    def count(self, outputs: int) -> int:
        """Outputs that are read in full."""
        return TopK(self.share).count(outputs)

    def check(self, site: Site) -> None:
        super().check(site)
        if len(site.column_readers) != 1:
            raise refuse("readers of a refined site", site.column_readers, "one")

    def output(
        self, y: Tensor, dropped: Tensor, layer: nn.Module, reader: int, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        chosen = exact_topk(y.float(), self.count(y.shape[-1]))
        return torch.where(chosen, y + nn.functional.linear(dropped, weight), y)

    def operations(self, site: Site) -> int:
        outputs, _ = site.input_shape(site.column_readers[0])
        return TopK(self.share).operations(replace(site, width=outputs))

    def weights_read(self, site: Site) -> int:
        """Rows that are read whole; what the preview has read of them is read again."""
        outputs, inputs = site.input_shape(site.column_readers[0])
        return self.count(outputs) * inputs
