"""Several tokens at once: how many weights any of them needs, and what one mask for all or one for each costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsity_lib import ops
from sparsity_lib.assets.models import load_model
from sparsity_lib.bench.matvec import onednn, onednn_can, onednn_pack
from sparsity_lib.bench.timing import interleaved
from sparsity_lib.observe import activations

MODELS = ("smollm2-135m-instruct", "gemma3-270m")
BATCHES = (1, 2, 4, 8, 12, 16)
DENSITY = 0.5
ROUNDS = 15
#: Where neurons are chosen by |g|, and where inputs of the down projection are.
SITES = ("gate", "down_in")
#: Tokens of a batch: one after the other in a text, or the same position of different texts.
ORDERS = ("neighbours", "strangers")


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model."""
    data = {}
    for name in MODELS:
        params = {"model": name, "batches": BATCHES, "density": DENSITY, "rounds": ROUNDS}
        data[name] = checkpoint.item(params, partial(measure, name))
        print(table(name, data[name]), flush=True)
    return data, {"batches": BATCHES, "density": DENSITY, "rounds": ROUNDS, "threads": torch.get_num_threads()}, [0]


def measure(name: str, texts: int = 16, length: int = 64) -> dict[str, Any]:
    """Overlap of real masks by batch size, and times of the down projections of all layers with them."""
    model, tokenizer = load_model(name)
    from sparsity_lib.experiments.common import evaluation_ids

    ids = evaluation_ids(tokenizer, texts, length)
    found: dict[str, Any] = {"read": {}, "times": {}}
    for site in SITES:
        layers = [layer.view(texts, length, -1) for layer in activations(model, site, ids)]
        found["read"][site] = {order: read_by_batch(layers, order, BATCHES, DENSITY) for order in ORDERS}
    weights = [layer.mlp.down_proj.weight.detach() for layer in model.base_model.layers]
    for order in ORDERS:
        found["times"][order] = {str(b): _times(weights, layers, order, b) for b in BATCHES}
    return found


def batches(layer: Tensor, order: str, size: int) -> Tensor:
    """Activations [texts, length, width] as batches [n, size, width]; the first position of a text is left out."""
    layer = layer[:, 1:]
    if order == "neighbours":
        usable = layer.shape[1] // size * size
        return layer[:, :usable].reshape(-1, size, layer.shape[-1])
    usable = layer.shape[0] // size * size
    return layer[:usable].transpose(0, 1).reshape(-1, size, layer.shape[-1])


def read_by_batch(layers: Sequence[Tensor], order: str, sizes: Sequence[int], density: float) -> dict[str, float]:
    """Batch size -> share of entries that any token of a batch keeps, each keeping its own `density` largest."""
    found = {}
    for size in sizes:
        shares = []
        for layer in layers:
            x = batches(layer, order, size).float().abs()
            border = x.kthvalue(x.shape[-1] - round(density * x.shape[-1]), -1, keepdim=True).values
            shares.append((x > border).any(1).float().mean())
        found[str(size)] = float(torch.stack(shares).mean())
    return found


def _times(weights: Sequence[Tensor], layers: Sequence[Tensor], order: str, size: int) -> dict[str, float]:
    """Median seconds of all layers' down projections for a batch: dense by torch, sparse with own and with shared masks."""
    narrow = [w.to(torch.bfloat16).contiguous() for w in weights]
    reordered = [onednn_pack(w, size) for w in narrow] if onednn_can(torch.bfloat16) else None
    packed = [ops.pack(w, "inputs") for w in narrow]
    k = round(DENSITY * packed[0].inputs)
    parts = [batches(layer, order, size).to(torch.bfloat16) for layer in layers]

    def each(call):
        def case(turn: int) -> None:
            for i, part in enumerate(parts):
                call(i, part[turn % len(part)])

        return case

    cases = {
        "torch linear": each(lambda i, x: torch.nn.functional.linear(x, narrow[i])),
        "own": each(lambda i, x: ops.input_sparse(x, packed[i], k=k)),
        "union": each(lambda i, x: ops.input_sparse(x, packed[i], k=k, share="union")),
    }
    if reordered:
        cases["torch oneDNN, packed weights"] = each(lambda i, x: onednn(x, reordered[i]))
    return {name: times.median for name, times in interleaved(cases, ROUNDS, desc=f"batches of {size}").items()}


def speed(times: dict[str, float], share: str) -> float:
    """How many times as fast as torch's best dense product the sparse one is, with "own" masks or their "union"."""
    return min(seconds for name, seconds in times.items() if name.startswith("torch")) / times[share]


def table(name: str, found: dict[str, Any]) -> str:
    """The figures of one model as text."""
    lines = [f"{name}: inputs of down projections, {DENSITY:.0%} a token: share that any token keeps, speed over torch's best"]
    for order in ORDERS:
        for size in BATCHES:
            read = found["read"]["down_in"][order][str(size)]
            own, union = (speed(found["times"][order][str(size)], share) for share in ("own", "union"))
            lines.append(f"  {order:10} {size:3}  {read:5.0%}   own {own:.2f} x, union {union:.2f} x")
    return "\n".join(lines)
