"""Look at activations and rankings without changing them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.analysis import jaccard, spearman, spread
from sparsity_lib.attach import attach
from sparsity_lib.by_block import final_states
from sparsity_lib.checks import fraction
from sparsity_lib.parts.base import as_float32
from sparsity_lib.parts.select import exact_topk
from sparsity_lib.plan import Plan
from sparsity_lib.progress import track
from sparsity_lib.recipe import Rule
from sparsity_lib.sites import Site, find_sites


def activations(model: nn.Module, kind: str, ids: Tensor) -> list[Tensor]:
    """Activations at every site of one kind on a text: a list over layers of [tokens, width], float32.

    Holds all of them: meant for a few hundred tokens.

    Raises
    ------
    SparsityError
        If the model lacks such sites, or ids are not [sequences, tokens].
    """
    sites = find_sites(model).of_kind(kind)
    found: list[list[Tensor]] = [[] for _ in sites]

    def keep(layer: int):
        def tap(x: Tensor) -> Tensor:
            found[layer].append(x.detach().float().flatten(0, -2).cpu())
            return x

        return tap

    _run(model, [(site, keep(i)) for i, site in enumerate(sites)], ids)
    return [torch.cat(pieces) for pieces in found]


def gradient_by_position(model: nn.Module, kind: str, ids: Tensor) -> Tensor:
    """sqrt(mean over neurons of (dL/dz)^2) at each site of a kind, by layer and position: [layers, tokens].

    L is the next-token loss summed over the sequence's tokens; averaged over sequences.
    """
    from sparsity_lib.passes import run_backward

    sites = find_sites(model).of_kind(kind)
    total = torch.zeros(len(sites), lm.check_ids(ids).shape[1], dtype=torch.float64)

    def keep(layer: int):
        def add(grad: Tensor) -> None:
            total[layer] += grad.detach().double().square().mean(-1).sum(0).cpu()

        def tap(x: Tensor) -> Tensor:
            if x.requires_grad:
                x.register_hook(add)
            return x

        return tap

    handles = [attach(model, site, keep(i)) for i, site in enumerate(sites)]
    try:
        for row in track(ids.split(1), desc="gradients by position", unit="sequence"):
            run_backward(model, row)
    finally:
        for handle in handles:
            handle.remove()
    return (total / len(ids)).sqrt()


@dataclass(frozen=True)
class Reordering:
    """What a static multiplier does to the ranking at one site.

    `jaccard`: overlap of the top-k masks with and without it, mean over tokens (1: it changes nothing).
    `spearman`: correlation of the two rankings, mean over tokens. `cv`, `p90_p10`: spread of the multiplier.
    """

    layer: int
    site: str
    jaccard: float
    spearman: float
    cv: float
    p90_p10: float


def reordering(model: nn.Module, plan: Plan, ids: Tensor, *, density: float = 0.5, rank_every: int = 8) -> list[Reordering]:
    """Compare each rule's top-k by |z| c with the one by |z| alone, in the rule's own basis, on a dense model's text.

    Parameters
    ----------
    plan
        Fitted, with saliency scores; nothing is dropped, the model stays dense.
    rank_every
        Rank correlations are taken on every n-th token.
    """
    fraction("density", density)
    sites = find_sites(model)
    found: dict[str, list[Tensor]] = {}
    taps = []
    for rule in plan.recipe.rules:
        for site in sites.of_kind(rule.site):
            taps.append((site, _compare(rule, site, plan, density, rank_every, found)))
    _run(model, taps, ids)
    result = []
    for rule in plan.recipe.rules:
        for site in sites.of_kind(rule.site):
            overlap, correlation = (float(torch.cat(p).mean()) for p in zip(*found[site.name], strict=True))
            result.append(
                Reordering(site.layer, rule.site, overlap, correlation, **spread(plan.tensors[f"{site.name}.saliency"]))
            )
    return result


def _compare(rule: Rule, site: Site, plan: Plan, density: float, every: int, found: dict):
    tensors = {name: plan.tensors[f"{site.name}.{name}"] for name in rule.shapes(site)}
    k = max(1, round(density * site.width))

    def tap(x: Tensor) -> Tensor:
        own = rule.transform.of_token(x.detach(), tensors)
        z = as_float32(rule.transform.forward(x.detach(), own)).flatten(0, -2)
        plain, scored = z.abs(), rule.score(z, tensors)
        overlap = jaccard(exact_topk(plain, k), exact_topk(scored, k))
        found.setdefault(site.name, []).append((overlap, torch.as_tensor(spearman(plain[::every], scored[::every]))))
        return x

    return tap


def _run(model: nn.Module, taps: list, ids: Tensor) -> None:
    rows = lm.check_ids(ids).split(1)
    handles = [attach(model, site, tap) for site, tap in taps]
    try:
        for _ in track(final_states(model, rows), desc="reading activations", total=len(rows), unit="sequence"):
            pass
    finally:
        for handle in handles:
            handle.remove()
