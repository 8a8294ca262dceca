"""A granular model run by the compiled operators, which leave the masked weights unread.

    with packed(model):
        model.generate(...)

y_o = (b + W m)_o + sum over kept i of (x_i - m_i) W[o, i], with each stripe's own thresholds theta s: what training
computed, with the constant part folded into the bias. The neuron mask saves W_down's columns here; W_up is read in full,
for want of an operator that takes a mask of its rows (`sparsity_lib.account` counts what the mask allows to skip).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsity_lib import ops
from sparsity_lib.cwic.convert import registry_of
from sparsity_lib.cwic.layers import CWICLinear
from sparsity_lib.errors import refuse
from sparsity_lib.sites import GATE


class PackedLinear(nn.Module):
    """The inference form of a `CWICLinear`: x [..., in] -> [..., out] in x's dtype, without gradients.

    Raises
    ------
    SparsityError
        If the layer has several stripes and their width is no multiple of `ops.STRIPE`.
    """

    def __init__(self, layer: CWICLinear, format: str | None = None) -> None:
        super().__init__()
        mean, scale, _ = layer.sparsity.rule()
        striped = len(layer.sparsity.theta) > 1
        if striped and layer.stripe % ops.STRIPE:
            fix = f"train with stripes of {ops.STRIPE} (uneven=True where they do not divide the outputs), or run it without"
            raise refuse(f"stripe of {layer.name}", layer.stripe, f"a multiple of {ops.STRIPE} for the operators", fix)
        with torch.no_grad():
            # Kept is |x - m| >= t; the operators keep what is above, so t moves to the next smaller number.
            limits = torch.nextafter(layer.sparsity.theta * scale, torch.tensor(-torch.inf, device=scale.device))
            constant = layer.weight.float() @ mean
            bias = constant if layer.bias is None else layer.bias.float() + constant
            weight = ops.pack(layer.weight, skip="inputs", format=format)
        self.__dict__["weight"] = weight
        self.rule = {
            "threshold": limits.contiguous() if striped else limits[0].contiguous(), "shift": mean, "bias": bias,
            "stripe_width": layer.stripe if striped else None}

    def forward(self, x: Tensor) -> Tensor:
        return ops.input_sparse(x, self.weight, **self.rule)


class PackedDown(nn.Module):
    """A down projection that skips the columns of neurons that the mask made zero."""

    def __init__(self, linear: nn.Linear, format: str | None = None) -> None:
        super().__init__()
        self.__dict__["weight"] = ops.pack(linear.weight, skip="inputs", format=format)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        return ops.input_sparse(x, self.weight, threshold=0.0, bias=self.bias)


@contextmanager
def packed(model: nn.Module, format: str | None = None) -> Iterator[nn.Module]:
    """Inside the block, the model's granular layers run by the operators, in evaluation mode and without gradients.

    `format` as for `ops.pack`. Raises as `PackedLinear` does, and for models without granular layers.
    """
    registry, was, training = registry_of(model), {}, model.training
    made: dict[str, nn.Module] = {
        name: PackedLinear(layer, format) for name, layer in registry.layers.items() if isinstance(layer, CWICLinear)}
    for site in registry.sites.sites.values():
        if site.kind == GATE:
            made[site.column_readers[0]] = PackedDown(model.get_submodule(site.column_readers[0]), format)
    try:
        for name, module in made.items():
            owner, _, child = name.rpartition(".")
            was[name] = model.get_submodule(name)
            setattr(model.get_submodule(owner), child, module)
        with torch.no_grad():
            yield model.eval()
    finally:
        for name, module in was.items():
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, module)
        model.train(training)
        registry.take_costs()
