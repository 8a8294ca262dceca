"""Fit recipes to a model by streaming over calibration text, in memory that the text's length does not change.

Parts are fitted in the order transform, score, select, repair, because each may need the one before:
a threshold is a quantile of scores, and scores live in the transformed basis. Each round that needs
a statistic is one pass over the text; recipes fitted together share passes and statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.attach import attach
from sparsity_lib.checks import count
from sparsity_lib.collectors import Collector, bytes_needed
from sparsity_lib.errors import SparsityError
from sparsity_lib.install import installed_on
from sparsity_lib.parts.base import Part
from sparsity_lib.plan import Plan
from sparsity_lib.progress import track
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import Site, find_sites

Batch = Mapping[str, Any]

#: Calibration text if nothing else is said: 16 sequences of 512 tokens.
TOKENS, LENGTH = 8192, 512


@dataclass
class _Fitting:
    """One rule at one site while it is being fitted."""

    rule: Rule
    site: Site
    tensors: dict[str, Tensor] = field(default_factory=dict)
    current: Part | None = None

    def stream_key(self) -> str:
        """Equal where the current part reads the same stream of numbers."""
        parts = self.rule.parts()
        watched = "h" if getattr(self.rule.score, "on_product", False) else "x"
        return "|".join([self.site.name, watched, *(p.key() for p in parts[: parts.index(self.current)])])

    def values(self, x: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the current part learns from: x, z, or scores."""
        if self.current is self.rule.transform:
            return x, grad
        z = self.rule.transform.forward(x, self.tensors)
        if self.current is self.rule.select:
            return self.rule.score(z, self.tensors), None
        return z, None if grad is None else self.rule.transform.gradient(grad, self.tensors)


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
) -> list[Plan]:
    """Fit several recipes to one dense model in shared passes over the same calibration text.

    Parameters
    ----------
    recipes
        What to fit.
    model
        A dense Hugging Face model; left as it was.
    tokenizer
        Needed where the embedded calibration text is used.
    ids
        Own calibration text, token ids [sequences, tokens].
    batches
        Instead of ids, for models that are not causal language models: keyword inputs of the model.
        Scores that need gradients then need batches with labels, for which the model returns a loss.
    tokens, length, source, seed
        How much of the embedded calibration text, in sequences of which length, from which source (all
        sources by default), in which order.
    batch_size
        Sequences a forward.

    Returns
    -------
    list of Plan
        In the order of `recipes`. Their `calibration` says what they were fitted on, and in `statistics_bytes` the most
        memory that statistics held at a time, which depends on the model's widths and not on the text's length.

    Raises
    ------
    SparsityError
        If the model is sparse already, lacks a site, or its activations are not finite.
    """
    if installed_on(model) is not None:
        raise SparsityError("Statistics of a sparse model were asked for. Fix: uninstall(model) first.")
    count("batch_size", batch_size)
    if batches is not None:
        stream = list(batches)
        described = {"batches": len(stream)}
    else:
        ids, described = _calibration_ids(tokenizer, ids, tokens, length, source, seed)
        stream = list(ids.split(batch_size))
    if not stream:
        raise SparsityError("There is nothing to calibrate on: no batches were given. Fix: pass at least one.")
    sites = find_sites(model)
    jobs = [[_Fitting(rule, site) for rule in r.rules for site in sites.of_kind(rule.site)] for r in recipes]
    for job in (job for jobs_of_one in jobs for job in jobs_of_one):
        job.rule.check(job.site)
    everything = [job for jobs_of_one in jobs for job in jobs_of_one]
    described["statistics_bytes"] = 0
    for step in range(max((len(job.rule.parts()) for job in everything), default=0)):
        held = _fit_step(model, stream, [job for job in everything if step < len(job.rule.parts())], step)
        described["statistics_bytes"] = max(described["statistics_bytes"], held)
    plans = []
    for recipe, done in zip(recipes, jobs, strict=True):
        tensors = {f"{job.site.name}.{name}": t for job in done for name, t in job.tensors.items()}
        plans.append(Plan(recipe, tensors, {job.site.name: job.site.width for job in done}, dict(described)))
    return plans


def _calibration_ids(tokenizer, ids, tokens, length, source, seed) -> tuple[Tensor, dict[str, Any]]:
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


def _fit_step(model: nn.Module, stream: list, jobs: list[_Fitting], step: int) -> int:
    """Fit one part of every job; returns the bytes that its statistics held."""
    shared: dict[str, Collector] = {}
    streams: dict[str, list[tuple[_Fitting, Collector]]] = {}
    mine: list[Collector | None] = []
    for job in jobs:
        job.current = job.rule.parts()[step]
        collector = job.current.collector(job.site)
        if collector is not None:
            key = f"{job.stream_key()}|{collector.key()}"
            if key not in shared:
                shared[key] = collector
                streams.setdefault(job.site.name, []).append((job, collector))
            collector = shared[key]
        mine.append(collector)
    if streams:
        names = sorted({job.current.role for job in jobs})
        _stream(model, stream, list(streams.values()), desc=f"calibrating {names[0]}")
    fitted: dict[str, dict[str, Tensor]] = {}
    for job, collector in zip(jobs, mine, strict=True):
        key = f"{job.stream_key()}|{job.current.key()}"  # equal parts on equal streams: fitted once, tensors shared
        if key not in fitted:
            fitted[key] = {n: t.to(_device(model)) for n, t in job.current.fit(collector, job.site).items()}
        job.tensors.update(fitted[key])
    return sum(bytes_needed(collector) for collector in shared.values())


def _stream(model: nn.Module, stream: list, watched: list[list[tuple[_Fitting, Collector]]], desc: str) -> None:
    """One pass over the text; every collector sees its site's values."""
    needs_grad = any(c.needs_grad for at_site in watched for _, c in at_site)
    handles = []
    training = [module for module in model.modules() if module.training]  # statistics of dropout are not wanted
    try:
        model.eval()
        if needs_grad and isinstance(stream[0], Tensor):
            lm.check_head(model)
        for at_site in watched:
            by_product: dict[bool, list] = {}
            for job, collector in at_site:
                by_product.setdefault(getattr(job.rule.score, "on_product", False), []).append((job, collector))
            for on_product, group in by_product.items():
                handles.append(attach(model, group[0][0].site, _Watch(group), on_product=on_product))
        for batch in track(stream, desc=desc, unit="batch"):
            _run(model, batch, needs_grad)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


class _Watch:
    """A tap that changes nothing and feeds the collectors of one site."""

    def __init__(self, group: list[tuple[_Fitting, Collector]]) -> None:
        self.group = group

    def __call__(self, x: Tensor) -> Tensor:
        plain = [(job, c) for job, c in self.group if not c.needs_grad]
        for job, collector in plain:
            collector.update(*job.values(x.detach(), None))
        wanting = [(job, c) for job, c in self.group if c.needs_grad]
        if wanting and x.requires_grad:
            value = x.detach()

            def feed(grad: Tensor) -> None:
                for job, collector in wanting:
                    collector.update(*job.values(value, grad))

            x.register_hook(feed)
        return x


def _run(model: nn.Module, batch: Tensor | Batch, needs_grad: bool) -> None:
    device = _device(model)
    if not needs_grad:
        with torch.no_grad():
            if isinstance(batch, Tensor):
                lm.hidden_states(model, batch.to(device))
            else:
                model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        return
    run_backward(model, batch)


def run_backward(model: nn.Module, batch: Tensor | Batch) -> None:
    """Forward and backward of the loss with gradients for activations only.

    Parameters stay frozen: just the embeddings' output asks for gradients, so no weight gradient is made.
    """
    device = _device(model)
    entry = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            if isinstance(batch, Tensor):
                lm.backward_next_token_loss(model, batch.to(device))
                return
            given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            loss = getattr(model(**given), "loss", None)
            if loss is None:
                raise SparsityError("A saliency needs a loss, and the model returned none. Fix: put labels into the batches.")
            loss.backward()
    finally:
        entry.remove()
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
