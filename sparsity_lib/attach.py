"""Run a function at a site: the one way in which the library watches or changes activations."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsity_lib.sites import GATE, Site

#: Called with the activation at a site [..., width]; what it returns takes its place.
Tap = Callable[[Tensor], Tensor]


class Attached:
    """A handle that takes the function off again."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def attach(model: nn.Module, site: Site, tap: Tap, *, on_product: bool = False) -> Attached:
    """Call `tap` on the activation at `site` in every forward.

    Layers that read the same tensor (q, k, v; gate, up) get the tap's result computed once.
    With `on_product`, a gate site's tap sees h = g * u at the down projection instead of g.
    """
    handle = Attached()
    if site.experts:
        experts = model.get_submodule(site.column_readers[0].rsplit(".", 1)[0])
        kind = "down_in" if on_product else site.kind
        handle.add(_tap_experts(experts, kind, tap))
    elif site.kind == GATE and not on_product:
        act = _own_activation(model, site.act)
        handle.add(act.register_forward_hook(lambda module, args, out: tap(out)).remove)
    else:
        shared = _Once(tap, last=model.get_submodule(site.column_readers[-1]))
        for reader in site.column_readers:
            module = model.get_submodule(reader)
            handle.add(module.register_forward_pre_hook(shared).remove)
    return handle


def attach_outputs(model: nn.Module, site: Site, change: Callable[[Tensor, int, nn.Module], Tensor]) -> Attached:
    """Call `change(y, number, layer)` on what the layers that read `site` put out; its result takes y's place.

    y [..., out] is the output of the module `layer`, which is `site.column_readers[number]`; its bias is contained.
    """
    handle = Attached()
    for number, reader in enumerate(site.column_readers):
        module = model.get_submodule(reader)

        def hook(module: nn.Module, args: tuple, out: Tensor, number: int = number) -> Tensor:
            return change(out, number, module)

        handle.add(module.register_forward_hook(hook).remove)
    return handle


class _Once:
    """A pre-hook that runs the tap once for all layers reading the same tensor."""

    def __init__(self, tap: Tap, last: nn.Module) -> None:
        self.tap, self.last = tap, last
        self.seen: Tensor | None = None
        self.made: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        made = self.made if x is self.seen else self.tap(x)
        # The last reader lets go of the tensors, so that no activation or graph outlives its forward.
        self.seen, self.made = (None, None) if module is self.last else (x, made)
        return (made, *args[1:])


def _own_activation(model: nn.Module, name: str) -> nn.Module:
    """The activation module, made this block's own if several blocks share one object."""
    module = model.get_submodule(name)
    users = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    if len(users) > 1:
        owner, child = name.rsplit(".", 1)
        module = copy.deepcopy(module)  # a shallow copy would share the hooks as well
        setattr(model.get_submodule(owner), child, module)
    return module


def _tap_experts(experts: nn.Module, kind: str, tap: Tap) -> Callable[[], None]:
    """Mixtures keep their experts in stacked parameters that no hook can see into: give them a forward with taps."""
    if "sparsity_taps" not in experts.__dict__:
        experts.__dict__["sparsity_taps"] = {}
        experts.forward = types.MethodType(_experts_forward, experts)
    taps = experts.__dict__["sparsity_taps"]
    taps.setdefault(kind, []).append(tap)

    def undo() -> None:
        taps[kind].remove(tap)
        if not any(taps.values()):
            experts.__dict__.pop("forward", None)
            experts.__dict__.pop("sparsity_taps", None)

    return undo


def _experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sum over a token's experts e of w_e * down_e(act(gate_e(x)) * up_e(x)), tokens [n, hidden]."""

    def tapped(kind: str, x: Tensor) -> Tensor:
        for tap in self.sparsity_taps.get(kind, ()):
            x = tap(x)
        return x

    shape = hidden_states.shape
    tokens = hidden_states.reshape(-1, shape[-1])
    x = tapped("up_in", tokens)
    out = torch.zeros_like(tokens)
    for expert in top_k_index.unique().tolist():
        if expert >= self.gate_up_proj.shape[0]:
            continue  # some routers mark a dropped slot with one index too many
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = nn.functional.linear(x[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
        hidden = tapped("down_in", tapped("gate", self.act_fn(gate)) * up)
        part = nn.functional.linear(hidden, self.down_proj[expert]) * top_k_weights[token, slot, None]
        out.index_add_(0, token, part.to(out.dtype))
    return out.reshape(shape)
