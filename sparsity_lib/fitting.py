"""Fit parts to what a pass over calibration text shows at their sites.

Parts are fitted in the order transform, score, select, repair, because each may need the one before: a threshold is a
quantile of scores, and scores live in the transformed basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsity_lib.attach import attach
from sparsity_lib.collectors import Collector, bytes_needed
from sparsity_lib.errors import SparsityError
from sparsity_lib.parts.base import Part
from sparsity_lib.passes import Text
from sparsity_lib.recipe import Rule
from sparsity_lib.sites import Site


@dataclass
class Fitting:
    """One rule at one site while it is being fitted."""

    rule: Rule
    site: Site
    tensors: dict[str, Tensor] = field(default_factory=dict)
    current: Part | None = None

    def stream_key(self) -> str:
        """Equal where the current part reads the same stream of numbers."""
        parts = self.rule.parts()
        watched = "h" if self.on_product else "x"
        return "|".join([self.site.name, watched, *(p.key() for p in parts[: parts.index(self.current)])])

    @property
    def on_product(self) -> bool:
        return getattr(self.rule.score, "on_product", False)

    def values(self, x: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the current part learns from: x, z, or scores."""
        if self.current is self.rule.transform:
            return x, grad
        transform, score, select = self.rule.transform, self.rule.score, self.rule.select
        tensors = transform.of_token(x, self.tensors)
        z = transform.forward(x, tensors)
        if self.current is select and not select.reads_values:
            return score(z, tensors), None
        if getattr(self.current, "reads_dropped", False):
            return x - transform.inverse(z * select(score(z, tensors), tensors), tensors), None
        return z, None if grad is None else transform.gradient(grad, tensors)

    def update(self, collector: Collector, x: Tensor, grad: Tensor | None) -> None:
        """Show the collector what the current part learns from; its refusal names the site."""
        try:
            collector.update(*self.values(x, grad))
        except SparsityError as error:
            raise SparsityError(f"Site {self.site.kind} of layer {self.site.layer}: {error}") from None


#: Jobs at one site with what collects for each.
Stream = list[tuple[Fitting, Collector]]


def fit_step(text: Text, jobs: Sequence[Fitting], step: int) -> int:
    """Fit one part of every job in one pass; returns the bytes that its statistics held."""
    collectors = collect(text, jobs, step)
    fitted: dict[str, dict[str, Tensor]] = {}
    for job, collector in zip(jobs, collectors, strict=True):
        readers = ",".join(job.site.column_readers)
        stream = job.site.name if collector is None else job.stream_key()
        key = f"{stream}|{readers}|{job.current.key()}"  # equal parts on equal streams: fitted once, tensors shared
        if key not in fitted:
            fitted[key] = {n: t.to(text.device) for n, t in job.current.fit(collector, job.site).items()}
        job.tensors.update(fitted[key])
    return sum(bytes_needed(c) for c in {id(c): c for c in collectors if c is not None}.values())


def collect(text: Text, jobs: Sequence[Fitting], step: int) -> list[Collector | None]:
    """The statistics that the parts of one step need, in the order of jobs; equal ones are shared."""
    shared: dict[str, Collector] = {}
    streams: dict[str, dict[tuple[str, ...], Stream]] = {}
    mine: list[Collector | None] = []
    for job in jobs:
        job.current = job.rule.parts()[step]
        collector = job.current.collector(job.site)
        if collector is not None:
            readers = job.site.column_readers if collector.needs_grad else ()  # values are the same for all readers
            key = f"{job.stream_key()}|{','.join(readers)}|{collector.key()}"
            if key not in shared:
                shared[key] = collector
                streams.setdefault(job.site.name, {}).setdefault(readers, []).append((job, collector))
            collector = shared[key]
        mine.append(collector)
    for watched in _passes(streams):
        _watch(text, watched, desc=f"calibrating {min(job.current.role for job in jobs)}")
    return mine


def _passes(streams: dict[str, dict[tuple[str, ...], Stream]]) -> list[list[Stream]]:
    """What each pass over the text watches: gradients through different readers of one site take a pass each."""
    passes: list[list[Stream]] = []
    for by_readers in streams.values():
        groups = [group for readers, group in by_readers.items() if readers] or [[]]
        groups[0] = groups[0] + by_readers.get((), [])
        passes += [[] for _ in groups[len(passes):]]
        for watched, group in zip(passes, groups, strict=False):
            watched.append(group)
    return passes


def _watch(text: Text, watched: list[Stream], desc: str) -> None:
    """One pass over the text; every collector sees its site's values."""
    handles = []
    try:
        for at_site in watched:
            by_product: dict[bool, list] = {}
            for job, collector in at_site:
                by_product.setdefault(job.on_product, []).append((job, collector))
            for on_product, group in by_product.items():
                handles.append(attach(text.model, group[0][0].site, _Watch(text, group), on_product=on_product))
        text.run(any(c.needs_grad for at_site in watched for _, c in at_site), desc)
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """A tap that changes nothing and feeds the collectors of one site."""

    def __init__(self, text: Text, group: list[tuple[Fitting, Collector]]) -> None:
        self.text, self.group = text, group

    def __call__(self, x: Tensor) -> Tensor:
        if not self.text.watching:
            return x
        site = self.group[0][0].site
        if not torch.isfinite(x).all():  # before any gradient: in the order of the forward, the first broken site is named
            raise SparsityError(
                f"Activations at site {site.kind} of layer {site.layer} hold NaN or infinity on the calibration text. "
                "Fix: load the model in float32 or bfloat16, and check its weights."
            )
        for job, collector in self.group:
            if not collector.needs_grad:
                job.update(collector, x.detach(), None)
        wanting = [(job, c) for job, c in self.group if c.needs_grad]
        if wanting and x.requires_grad:
            value, x = x.detach(), x.view_as(x)  # the view is what this site's readers read: no other's gradient comes here

            def feed(grad: Tensor) -> None:
                for job, collector in wanting:
                    job.update(collector, value, grad)

            x.register_hook(feed)
        self.text.reached(site)
        return x
