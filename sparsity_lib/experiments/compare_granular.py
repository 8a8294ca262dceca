"""CWIC in the comparison: SmolLM2 with the thresholds that come with the book, which were trained, unlike all else there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from sparsity_lib.cwic import measure, registry_of
from sparsity_lib.cwic.shipped import SHIPPED, load_shipped
from sparsity_lib.evaluate.benchmarks import run_benchmarks
from sparsity_lib.evaluate.quality import Quality, evaluate_other
from sparsity_lib.experiments import common
from sparsity_lib.experiments.compare_common import DTYPE, Bench
from sparsity_lib.overheads import Overheads

METHOD = "cwic"
#: Share of all weights that an artifact was trained to skip -> its name.
ARTIFACTS = {0.5: "smollm2-cwic-2x", 0.667: "smollm2-cwic-3x"}


def shares_of(model: str) -> tuple[float, ...]:
    """The shares there are for a model: none where nothing was trained."""
    return tuple(share for share, name in ARTIFACTS.items() if SHIPPED[name].base == model)


def load(share: float) -> nn.Module:
    """The granular model of a share, in the comparison's dtype."""
    return load_shipped(ARTIFACTS[share], common.dtype_named(DTYPE))[0]


def quality(bench: Bench, shares: Sequence[float], every: int) -> dict[str, Any]:
    """Quality and shares, as `compare_quality.measured` has them for other methods."""
    rows, start = [], None
    for share in shares:
        model = load(share)
        start = start or evaluate_other(bench.model, bench.model, bench.ids, every=every)
        found = evaluate_other(bench.model, model, bench.ids, every=every)
        rows.append({"share": share, "artifact": ARTIFACTS[share], "quality": found.to_json(),
                     "shares": {"skipped": skipped(model, bench.ids[:2]), "extra": asdict(overheads(model))}})
    return {"points": rows, "dense": None if start is None else start.to_json(), "ids": common.fingerprint(bench.ids)}


def skipped(model: nn.Module, ids: Tensor) -> float:
    """Share of all weights that its masks leave unread, less the thresholds, which are read for every token."""
    registry = registry_of(model)
    return 1 - 1 / measure(model, ids).ratio() - sum(t.numel() for t in registry.thresholds().values()) / registry.dense


def overheads(model: nn.Module) -> Overheads:
    """Thresholds and statistics as kept for decoding, float32; a size and a comparison for each entry and stripe."""
    registry = registry_of(model)
    thresholds = sum(layer.sparsity.theta.numel() for layer in registry.layers.values())
    entries = sum(layer.sparsity.theta.shape[-1] for layer in registry.layers.values())
    own = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".sparsity." not in name)
    head = model.get_output_embeddings().weight
    copy = head.numel() * head.element_size() if registry.head is not None else 0
    return Overheads(4 * (thresholds + 2 * entries), copy, own, entries + thresholds, 0, 2 * registry.dense)


def tasks(bench: Bench, params: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmarks' outcomes of one share."""
    model = load(params["share"])
    results = {task: run_benchmarks(model, bench.tokenizer, task, limit=limit).to_dict()
               for task, limit in params["tasks"].items()}
    return {"results": results, "skipped": skipped(model, bench.ids[:2])}


def at_share(points: Sequence[Mapping[str, Any]], share: float) -> Quality | None:
    """The stored quality of one share."""
    return next((Quality.from_json(p["quality"]) for p in points if abs(p["share"] - share) < 1e-9), None)
