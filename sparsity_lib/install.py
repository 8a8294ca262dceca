"""Install a plan into a model, which stays an ordinary Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sparsity_lib import hf
from sparsity_lib.attach import Attached
from sparsity_lib.errors import SparsityError
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import HEAD_IN, Site, SiteMap, find_sites
from sparsity_lib.sparsifier import Sparsifier, put_on
from sparsity_lib.stored import device_of

#: Name under which a block holds its sparsifiers; part of the checkpoint's tensor names.
CHILD = "sparsity"


@dataclass
class Installed:
    """What `install` left on a model."""

    recipe: Recipe
    sites: SiteMap
    handles: list[Attached]
    sparsifiers: dict[str, Sparsifier]
    #: "LAYER.SITE" -> the site as the recipe sees it: of the layers that read it, those of the rule.
    placed: dict[str, Site]
    calibration: dict


def installed_on(model: nn.Module) -> Installed | None:
    """What is installed on the model, or None."""
    return model.__dict__.get("_sparsity_installed")


def install(model: nn.Module, plan: Plan) -> nn.Module:
    """Make `model` sparse in place, and return it.

    It generates, evaluates and saves like before; `save_pretrained` writes the plan's tensors into the
    checkpoint and the recipe into config.json, and `from_pretrained` restores both once this library
    is imported.

    Raises
    ------
    SparsityError
        If a plan is installed already, or this one was fitted to a model of another shape.
    """
    if installed_on(model) is not None:
        raise SparsityError(
            f"The model already carries the recipe {installed_on(model).recipe.method!r}. Fix: uninstall(model) first."
        )
    sites = find_sites(model)
    plan.check_fits(sites)
    if plan.recipe.token_share < 1 and any(s.experts for s in sites.sites.values()):
        raise SparsityError(
            f"token_share = {plan.recipe.token_share} cannot be kept in a mixture of experts, whose layers see tokens "
            "without their place in the sequence. Fix: token_share=1."
        )
    handles, sparsifiers, placed = [], {}, {}
    for rule, site in plan.recipe.placed(sites):
        block = model.get_submodule(site.block)
        sparsifier = Sparsifier(rule, site, plan.recipe.token_share, device=_device(model, site))
        sparsifier.fill({name: plan.tensors[f"{site.name}.{name}"] for name in rule.shapes(site)})
        if not hasattr(block, CHILD):
            block.add_module(CHILD, nn.ModuleDict())
        getattr(block, CHILD)[site.kind] = sparsifier
        handles.append(put_on(model, site, sparsifier))
        sparsifiers[site.name], placed[site.name] = sparsifier, site
    state = Installed(plan.recipe, sites, handles, sparsifiers, placed, dict(plan.calibration))
    model.__dict__["_sparsity_installed"] = state
    #: Read by the benchmark runner: tokens may only be repacked where each is treated by itself.
    model.sparsity_needs_sequences = plan.recipe.token_share < 1
    hf.mark(model, plan)
    return model


def uninstall(model: nn.Module) -> nn.Module:
    """Make the model dense again, in place. Does nothing to a dense model."""
    state = model.__dict__.pop("_sparsity_installed", None)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    for block in state.sites.blocks:
        module = model.get_submodule(block)
        if hasattr(module, CHILD):
            delattr(module, CHILD)
    model.sparsity_needs_sequences = False
    hf.unmark(model)
    return model


@contextmanager
def installed(model: nn.Module, plan: Plan | None) -> Iterator[nn.Module]:
    """The model with `plan` inside the block, and without it after; None leaves it dense."""
    if plan is None:
        yield model
        return
    install(model, plan)
    try:
        yield model
    finally:
        uninstall(model)


def head_of(model: nn.Module, plan: Plan | None) -> Callable[[], AbstractContextManager]:
    """Contexts inside which the head of a dense `model` is as sparse as `plan` makes it, while its blocks stay dense.

    For hidden states that were made under the plan, and meet the head when another is at work already.
    """
    sites = find_sites(model)
    rules = [] if plan is None else [(r, s) for r, s in plan.recipe.placed(sites) if s.kind == HEAD_IN]
    if not rules:
        return nullcontext
    (rule, site), = rules
    sparsifier = Sparsifier(rule, site, device=_device(model, site))
    sparsifier.fill({name: plan.tensors[f"{site.name}.{name}"] for name in rule.shapes(site)})

    @contextmanager
    def sparse() -> Iterator[None]:
        handle = put_on(model, site, sparsifier)
        try:
            yield
        finally:
            handle.remove()

    return sparse


def _device(model: nn.Module, site) -> torch.device:
    return device_of(model.get_submodule(site.block))
