"""Fit recipes to a model by streaming over calibration text, in memory that the text's length does not change.

Each round that needs a statistic is one pass over the text; recipes fitted together share passes and statistics.
Fitted sequentially, each site's statistics are taken after all sites before it have been made sparse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.blocks import Blocks
from sparsity_lib.by_block import text_of
from sparsity_lib.checks import count
from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.fitting import Fitting, fit_step
from sparsity_lib.install import installed_on
from sparsity_lib.parts.base import Part
from sparsity_lib.passes import Batch, Text
from sparsity_lib.plan import Plan
from sparsity_lib.progress import track
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import HEAD_IN, KINDS, Site, SiteMap, find_sites
from sparsity_lib.sparsifier import Sparsifier, put_on
from sparsity_lib.stored import is_streamed

#: Calibration text if nothing else is said: 16 sequences of 512 tokens.
TOKENS, LENGTH = 8192, 512


def fit(recipe: Recipe, model: nn.Module, tokenizer=None, **options) -> Plan:
    """Fit one recipe; see `fit_many` for the options."""
    return fit_many([recipe], model, tokenizer, **options)[0]


def fit_many(
    recipes: Sequence[Recipe],
    model: nn.Module,
    tokenizer=None,
    *,
    ids: Tensor | None = None,
    batches: Iterable[Batch] | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    source: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    sequential: bool = False,
) -> list[Plan]:
    """Fit several recipes to one dense model in shared passes over the same calibration text.

    Parameters
    ----------
    recipes
        What to fit.
    model
        A dense Hugging Face model; left as it was. One whose blocks stay on disk (`load_model` with stream=True) is fitted
        block by block, each read once, and once more there and back where a saliency needs gradients.
    tokenizer
        Needed where the embedded calibration text is used.
    ids
        Own calibration text, token ids [sequences, tokens].
    batches
        Instead of ids, for models that are not causal language models: keyword inputs of the model.
        Scores that need gradients then need batches with labels, for which the model returns a loss.
    tokens
        How much of the embedded calibration text, where neither ids nor batches are given.
    length
        Tokens in each of its sequences.
    source
        Where it is from (`assets.sources`); by default all calibration sources.
    seed
        Of its order.
    batch_size
        Sequences a forward.
    sequential
        Fit one site after the other, each on activations that the sites before it have made sparse already (as SCAP's
        release does), not on the dense model's. Recipes then share nothing, a block is passed once for each statistic at
        each of its sites, and one hidden state a token of the text is kept.

    Returns
    -------
    list of Plan
        In the order of `recipes`. Their `calibration` says what they were fitted on, and in `statistics_bytes` the most
        memory that statistics held at a time, which depends on the model's widths and not on the text's length.

    Raises
    ------
    SparsityError
        If the model is sparse already, lacks a site, its activations are not finite, or there are too few for a
        threshold's quantile; if a saliency is asked for sequentially.
    """
    if installed_on(model) is not None:
        raise SparsityError("Statistics of a sparse model were asked for. Fix: uninstall(model) first.")
    if not isinstance(sequential, bool):
        raise refuse("sequential", sequential, "true or false")
    stream, described = calibration_stream(tokenizer, ids, batches, tokens, length, source, seed, batch_size)
    sites = find_sites(model)
    jobs = [[Fitting(rule, site) for rule, site in recipe.placed(sites)] for recipe in recipes]
    for job in (job for jobs_of_one in jobs for job in jobs_of_one):
        job.rule.check(job.site)
    if sequential and any(rule.site == HEAD_IN for recipe in recipes for rule in recipe.rules):
        raise refuse("sequential with a rule at the head", True, "false", "blocks are passed one by one, the head is in none")
    if sequential:
        held = [_fit_sequentially(model, stream, sites, done, r.token_share) for r, done in zip(recipes, jobs, strict=True)]
        described = {**described, "sequential": True, "statistics_bytes": max(held, default=0)}
    elif is_streamed(model):
        described["statistics_bytes"] = _fit_by_block(model, stream, sites, [job for done in jobs for job in done])
    else:
        described["statistics_bytes"] = _fit_together(Text(model, stream), [job for done in jobs for job in done])
    plans = []
    for recipe, done in zip(recipes, jobs, strict=True):
        tensors = {f"{job.site.name}.{name}": t for job in done for name, t in job.tensors.items()}
        plans.append(Plan(recipe, tensors, {job.site.name: job.site.width for job in done}, dict(described)))
    return plans


def _fit_together(text: Text, jobs: list[Fitting]) -> int:
    """Fit all jobs to the dense model; returns the most bytes that statistics held at a time."""
    held = 0
    for step in range(max((len(job.rule.parts()) for job in jobs), default=0)):
        held = max(held, fit_step(text, [job for job in jobs if step < len(job.rule.parts())], step))
    return held


def _fit_by_block(model: nn.Module, stream: list, sites: SiteMap, jobs: list[Fitting]) -> int:
    """Fit all jobs to the dense model with each block read once; those that need gradients step by step after the others.

    What a block's statistics took is free before the next; returns bytes as above, the hidden states included.
    """
    held, with_gradient = 0, []
    places: dict[int, list[Fitting]] = {}
    for job in jobs:
        if any(_needs_grad(part, job.site) for part in job.rule.parts()):
            with_gradient.append(job)
        else:
            places.setdefault(sites.layers if job.site.kind == HEAD_IN else job.site.layer, []).append(job)
    if places:
        with Blocks(model, stream, sites, carry=True) as blocks:
            for layer in track(range(max(places) + 1), desc="calibrating blocks", unit="block"):
                here = places.get(layer, [])
                for step in range(max((len(job.rule.parts()) for job in here), default=0)):
                    held = max(held, fit_step(blocks, [j for j in here if step < len(j.rule.parts())], step) + blocks.nbytes)
                if layer < max(places):
                    blocks.advance()
    return max(held, _fit_together(text_of(model, stream), with_gradient))


def _needs_grad(part: Part, site: Site) -> bool:
    collector = part.collector(site)
    return collector is not None and collector.needs_grad


def _fit_sequentially(model: nn.Module, stream: list, sites: SiteMap, jobs: list[Fitting], token_share: float) -> int:
    """Fit one recipe's jobs in the order of the forward, each with the fitted ones at work; returns bytes as above."""
    held = 0
    with Blocks(model, stream, sites) as blocks:
        for layer in track(range(sites.layers), desc="calibrating blocks", unit="block"):
            handles = []
            try:
                for job in sorted((j for j in jobs if j.site.layer == layer), key=lambda j: KINDS.index(j.site.kind)):
                    blocks.stop_at = job.site
                    for step in range(len(job.rule.parts())):
                        held = max(held, fit_step(blocks, [job], step) + blocks.nbytes)
                    sparsifier = Sparsifier(job.rule, job.site, token_share, device=blocks.device)
                    sparsifier.fill(job.tensors)
                    handles.append(put_on(model, job.site, sparsifier))
                if layer + 1 < sites.layers:
                    blocks.advance()
            finally:
                for handle in handles:
                    handle.remove()
    return held


def calibration_stream(tokenizer, ids, batches, tokens, length, source, seed, batch_size) -> tuple[list, dict]:
    """What `fit_many`'s arguments of these names ask for: the batches to run, and how a plan describes them."""
    count("batch_size", batch_size)
    if batches is not None:
        stream = list(batches)
        described = {"batches": len(stream)}
    else:
        ids, described = _calibration_ids(tokenizer, ids, tokens, length, source, seed)
        stream = list(ids.split(batch_size))
    if not stream:
        raise SparsityError("There is nothing to calibrate on: no batches were given. Fix: pass at least one.")
    return stream, described


def _calibration_ids(tokenizer, ids, tokens, length, source, seed) -> tuple[Tensor, dict]:
    if ids is not None:
        ids = lm.check_ids(ids)
        return ids, {"source": "given", "tokens": ids.numel(), "length": ids.shape[1]}
    if tokenizer is None:
        raise SparsityError("Calibration text needs a tokenizer. Fix: fit(recipe, model, tokenizer), or pass ids=.")
    from sparsity_lib.assets.texts import token_sequences  # the library's core works without the assets

    count("tokens", tokens)
    count("length", length, minimum=2)
    ids = token_sequences(tokenizer, "calibration", tokens=tokens, length=length, source=source, seed=seed)
    return ids, {"source": source or "all", "tokens": ids.numel(), "length": length, "seed": seed}
