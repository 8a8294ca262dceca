"""From a dense decoder to a granular one, in place: every linear layer of its blocks, its FFN's neurons, and its head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from sparsity_lib import hf
from sparsity_lib.accounting import COUNTER, weights_per_token
from sparsity_lib.checks import positive
from sparsity_lib.cwic.config import CWICConfig
from sparsity_lib.cwic.layers import CWICActivation, CWICLinear, Ledger
from sparsity_lib.errors import SparsityError
from sparsity_lib.install import installed_on
from sparsity_lib.sites import GATE, Linear, SiteMap, find_sites

HEAD = "head"
Layer = CWICLinear | CWICActivation


@dataclass
class Registry:
    """The granular layers of one model.

    layers: name -> layer, in the model's order. dense: weights that the dense model reads for one token, by the rules of
    `accounting`. sites: where things were before they were replaced. head: the head's name in `layers`, or None.
    """

    config: CWICConfig
    layers: dict[str, Layer]
    ledger: Ledger
    sites: SiteMap
    dense: int
    head: str | None

    @property
    def always(self) -> int:
        """Weights that every token reads: what no granular layer covers."""
        return self.dense - sum(layer.dense_cost for layer in self.layers.values())

    def thresholds(self) -> dict[str, nn.Parameter]:
        """theta of each layer by the layer's name."""
        return {name: layer.sparsity.theta for name, layer in self.layers.items()}

    def clamp(self) -> None:
        """Keep all thresholds at or above zero; to be called after each update."""
        for layer in self.layers.values():
            layer.sparsity.clamp()

    def scale(self, eta: float):
        """Factors on learning rates, for `train(scale=...)`: eta sqrt(n) for thresholds of n inputs, 1 for the rest."""
        positive("eta", eta)

        def factor(name: str, parameter: nn.Parameter) -> float:
            return eta * parameter.shape[-1] ** 0.5 if name.endswith("sparsity.theta") else 1.0

        return factor

    def take_costs(self) -> dict[str, Tensor]:
        """Weights read by each token in each layer in the last forward, [tokens]; forgets them."""
        found, self.ledger.costs = self.ledger.costs, {}
        return found

    @contextmanager
    def dense_inside(self) -> Iterator[None]:
        """Inside the block the model computes what the dense one would."""
        self.ledger.enabled = False
        try:
            yield
        finally:
            self.ledger.enabled = True


def registry_of(model: nn.Module) -> Registry:
    """The registry of a converted model; raises SparsityError for any other."""
    found = model.__dict__.get("_cwic")
    if found is None:
        raise SparsityError("The model has no granular layers. Fix: cwic.convert(model, CWICConfig(stripe=...)) first.")
    return found


def convert(model: nn.Module, config: CWICConfig) -> Registry:
    """Replace the linear layers of a decoder by granular ones, in place; with thresholds at zero it computes what it did.

    Weights stay the same objects (ties included). q, k and v each get thresholds of their own, and so do o, the gate and
    the head; up and down follow the gate's neuron mask. An FFN without a gate gets two granular layers instead.

    Raises
    ------
    SparsityError
        If a stripe does not divide a layer's outputs, the model is sparse already, or its layers are no plain Linears.
    """
    if installed_on(model) is not None or model.__dict__.get("_cwic") is not None:
        raise SparsityError("The model is sparse already. Fix: start from the dense model.")
    sites, ledger = find_sites(model), Ledger()
    head = _head_of(model) if config.head else None
    chosen, masked = _covered(sites), [s for s in sites.sites.values() if s.kind == GATE]
    _check(model, chosen, head, config)
    dense = weights_per_token(model)
    layers: dict[str, Layer] = {}
    for linear in chosen:
        layers[linear.name] = CWICLinear(model.get_submodule(linear.name), linear.name, linear.role, config, ledger)
    for site in masked:
        reader = model.get_submodule(site.column_readers[0])
        each = sum(model.get_submodule(name).weight.numel() for name in (*site.row_readers, *site.column_readers)) // site.width
        act = copy.deepcopy(model.get_submodule(site.act))
        layers[site.act] = CWICActivation(act, site.act, site.width, each, config, ledger, reader.weight.device)
    if head is not None:
        layers[head] = CWICLinear(model.get_submodule(head), head, HEAD, config, ledger)
    for name, layer in layers.items():
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, layer)
    registry = Registry(config, layers, ledger, sites, dense, head)
    model.__dict__["_cwic"], model.__dict__[COUNTER] = registry, _count
    hf.mark_as(model, hf.SparsityConfig(layers={"kind": "cwic", "config": config.to_json()}))
    return registry


def _count(model: nn.Module, ids: Tensor):
    from sparsity_lib.cwic.activity import account  # activity needs this module: the import cannot be at the top

    return account(model, ids)


def _covered(sites: SiteMap) -> list[Linear]:
    """The linear layers with thresholds of their own: all but those that a gate's mask covers."""
    by_gate = {name for s in sites.sites.values() if s.kind == GATE for name in (*s.row_readers, *s.column_readers)}
    return [linear for linear in sites.linears if linear.name not in by_gate]


def _head_of(model: nn.Module) -> str:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = next((name for name, module in model.named_modules() if head is not None and module is head), None)
    if found is None:
        raise SparsityError(f"{type(model).__name__} has no language-model head. Fix: CWICConfig(head=False).")
    return found


def _check(model: nn.Module, chosen: list[Linear], head: str | None, config: CWICConfig) -> None:
    """Everything that can be refused, before anything is replaced."""
    if any(site.experts for site in find_sites(model).sites.values()):
        raise SparsityError("Experts have no granular layers. Fix: use a model without a mixture.")
    named = [(linear.name, linear.role) for linear in chosen] + ([(head, HEAD)] if head else [])
    for name, role in named:
        module = model.get_submodule(name)
        if type(module) is not nn.Linear:
            raise SparsityError(f"{name} is a {type(module).__name__}, not a Linear. Fix: use a model of plain Linears.")
        config.width(role, module.out_features)
