"""What the explorer shows of masks: each method's scores of one text, at a middle layer, as ranks of one byte."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import results
from sparsity_lib.assets import load_model
from sparsity_lib.experiments.common import CALIBRATION, MODELS
from sparsity_lib.fit import fit
from sparsity_lib.methods import claws, larosa
from sparsity_lib.observe import activations
from sparsity_lib.sites import find_sites

#: A text of this book's own, so that the page can show it.
TEXT = ("Most of the time that a model needs for its next word goes into reading weights from memory, "
        "and many of them meet a number close to zero.")
CHANNELS = 96
#: How a method chooses: "token", as many of every token; "layer", whatever lies above one threshold.
BY = {"cats": "layer", "claws": "token", "oracle": "token", "teal": "layer", "wina": "layer", "larosa": "token"}


def run(checkpoint: results.Checkpoint) -> tuple[Any, dict[str, Any], list[int]]:
    """The experiment "explorer_masks"."""
    data = {model: checkpoint.item({"model": model, "text": TEXT}, lambda model=model: masks(model)) for model in MODELS}
    return data, {"text": TEXT, "channels": CHANNELS, "by": BY, "calibration": CALIBRATION}, [CALIBRATION["seed"]]


def masks(name: str) -> dict[str, Any]:
    """Tokens of the text and, by method, the rank of each score: [tokens, channels] bytes, 255 the largest, in base64."""
    model, tokenizer = load_model(name)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    layer = find_sites(model).layers // 2
    scores = scores_of(model, tokenizer, ids, layer)
    return {
        "layer": layer, "tokens": [tokenizer.decode([i]) for i in ids[0].tolist()],
        "ranks": {method: base64.b64encode(ranks(score, BY[method])[:, :CHANNELS].numpy().tobytes()).decode()
                  for method, score in scores.items()},
    }


@torch.no_grad()
def scores_of(model: nn.Module, tokenizer: Any, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """Method -> its scores [tokens, width] at one layer: of the gate's neurons, or of the inputs of gate and up."""
    def seen(kind: str) -> Tensor:
        return activations(model, kind, ids)[layer].float()

    with torch.enable_grad():
        plans = {make.__name__: fit(make(0.5), model, tokenizer, **CALIBRATION) for make in (claws, larosa)}
    g, h, x = seen("gate"), seen("down_in"), seen("up_in")
    site = find_sites(model).of_kind("up_in")[layer]
    columns = torch.stack([model.get_submodule(path).weight.float().square().sum(0) for path in site.column_readers]).sum(0).sqrt()
    return {
        "cats": g.abs(), "claws": g.abs() * plans["claws"].tensors[f"{layer}.gate.saliency"], "oracle": h.abs(), "teal": x.abs(),
        "wina": x.abs() * columns, "larosa": (x @ plans["larosa"].tensors[f"{layer}.up_in.rotation"].float()).abs(),
    }


def ranks(scores: Tensor, by: str) -> Tensor:
    """Each entry's rank among its token's ("token") or among all ("layer"), scaled to whole numbers from 0 to 255."""
    order: Callable[[Tensor], Tensor] = lambda s: s.argsort(-1, stable=True).argsort(-1)  # noqa: E731
    flat = scores if by == "token" else scores.reshape(1, -1)
    found = order(flat).double() / max(1, flat.shape[-1] - 1)
    return (255 * found).round().to(torch.uint8).view(scores.shape)
