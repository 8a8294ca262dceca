"""A granular model run by the compiled operators, which leave the masked weights unread.

    with packed(model):
        model.generate(...)
    Decoder(model).generate(...)         # or a whole token in one call: sparsity_lib.decode

y_o = (b + W m)_o + sum over kept i of (x_i - m_i) W[o, i], with each stripe's own thresholds theta s: what training
computed, with the constant part folded into the bias. In a gated FFN the neuron mask leaves rows of W_up and columns of
W_down unread, so that what is read is what `sparsity_lib.account` counts: (d / k) |G| + 2 n |M| weights (section 3.7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity_lib import ops
from sparsity_lib.cwic.convert import Registry, registry_of
from sparsity_lib.cwic.export import load_thresholds
from sparsity_lib.cwic.layers import CWICActivation, CWICLinear
from sparsity_lib.decode import Decoder
from sparsity_lib.decode.granular import Granular, folded, limits
from sparsity_lib.errors import SparsityError
from sparsity_lib.sites import GATE, Site


class PackedLinear(nn.Module):
    """The inference form of a `CWICLinear`: x [..., in] -> [..., out] in x's dtype, without gradients."""

    def __init__(self, layer: CWICLinear, format: str | None = None) -> None:
        super().__init__()
        rule: Granular = folded(layer)
        striped = len(rule.thresholds) > 1
        weight = ops.pack(layer.weight, skip="inputs", format=format, stripe=layer.stripe if striped else None)
        self.__dict__["weight"] = weight
        self.rule = {"threshold": rule.thresholds if striped else rule.thresholds[0], "shift": rule.shift, "bias": rule.bias}

    def forward(self, x: Tensor) -> Tensor:
        return ops.input_sparse(x, self.weight, **self.rule)


class PackedGLU(nn.Module):
    """The inference form of a gated FFN: x [..., in] -> [..., out]. up and down are read where the neuron mask keeps them."""

    def __init__(self, gate: CWICLinear, act: CWICActivation, up: nn.Linear, down: nn.Linear, format: str | None = None) -> None:
        super().__init__()
        self.gate, self.act = PackedLinear(gate, format), act.act
        self.__dict__["matrices"] = ops.pair(ops.pack(up.weight, "outputs", format), ops.pack(down.weight, "inputs", format))
        biases = (None if each.bias is None else each.bias.detach().float() for each in (up, down))
        self.rule = {"threshold": limits(act.sparsity)[0], **dict(zip(("up_bias", "down_bias"), biases, strict=True))}

    def forward(self, x: Tensor) -> Tensor:
        return ops.gated(x, self.act(self.gate(x)), *self.matrices, **self.rule)


@dataclass(frozen=True)
class _Block:
    """A gated FFN: the module that holds it, and its parts by name."""

    owner: str
    gate: str
    act: str
    up: str
    down: str


@contextmanager
def packed(model: nn.Module, format: str | None = None) -> Iterator[nn.Module]:
    """Inside the block, the model's granular layers run by the operators, in evaluation mode and without gradients.

    `format` as for `ops.pack`.

    Raises
    ------
    SparsityError
        For models without granular layers, or gated FFNs that hold more than gate, activation, up and down.
    """
    registry, was, training = registry_of(model), {}, model.training
    blocks = [_block(model, registry, site) for site in registry.sites.sites.values() if site.kind == GATE]
    inside = {name for block in blocks for name in (block.gate, block.act)}
    made: dict[str, nn.Module] = {
        name: PackedLinear(layer, format) for name, layer in registry.layers.items() if name not in inside}
    for block in blocks:
        parts = (model.get_submodule(name) for name in (block.gate, block.act, block.up, block.down))
        made[block.owner] = PackedGLU(*parts, format)
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


def decoder(model: nn.Module, thresholds: str | os.PathLike | None = None, **options) -> Decoder:
    """A decoder of a granular model: of a converted one, or of a dense one (converted in place) with saved thresholds.

    Parameters
    ----------
    thresholds
        A file of `save_thresholds`.
    options
        format, group and capacity, as for `Decoder`.

    Raises
    ------
    SparsityError
        As `load_thresholds` and `Decoder` do, and for a model that is not granular without thresholds.
    """
    if thresholds is not None:
        load_thresholds(model, thresholds)
    registry_of(model)
    return Decoder(model, **options)


def _block(model: nn.Module, registry: Registry, site: Site) -> _Block:
    owner = site.act.rpartition(".")[0]
    gate = next(x.name for x in registry.sites.linears if x.layer == site.layer and x.role == "gate")
    found = _Block(owner, gate, site.act, site.row_readers[0], site.column_readers[0])
    children = {f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_children()}
    if children != {found.gate, found.act, found.up, found.down}:
        held = ", ".join(sorted(children))
        raise SparsityError(f"{owner} is no plain gated FFN: it holds {held}. Fix: run it without `packed`.")
    return found
