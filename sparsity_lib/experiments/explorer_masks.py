"""What the explorer shows of masks: each method's scores of one text, at a middle layer, as ranks of one byte."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import results
from sparsity_lib.assets import load_model
from sparsity_lib.experiments.common import MODELS
from sparsity_lib.fit import fit
from sparsity_lib.methods import claws, larosa
from sparsity_lib.observe import activations
from sparsity_lib.sites import find_sites

#: A text of this book's own, so that the page can show it.
TEXT = ("Most of the time that a model needs for its next word goes into reading weights from memory, "
        "and many of them meet a number close to zero.")
#: Entries of each token that are kept.
CHANNELS = 96
#: Score -> what is ranked together: "token", of which each keeps as many; "layer", where one threshold decides for all tokens.
RANKED = {
    "gate": "layer", "gate_saliency": "token", "down": "token", "down_threshold": "layer", "input": "token",
    "input_threshold": "layer", "input_norm": "layer", "input_rotated": "token",
}
CALIBRATION = {"tokens": 2048, "length": 512, "seed": 0}


def run(checkpoint: results.Checkpoint) -> tuple[Any, dict[str, Any], list[int]]:
    """The experiment "explorer_masks": one item a model."""
    params = {"text": TEXT, "channels": CHANNELS, "ranked": RANKED, "calibration": CALIBRATION}
    found = checkpoint.items([({"model": model, **params}, partial(masks, model)) for model in MODELS])
    return dict(zip(MODELS, found, strict=True)), params, [CALIBRATION["seed"]]


def masks(name: str) -> dict[str, Any]:
    """Tokens of the text and, by score, the rank of each entry: [tokens, CHANNELS] bytes, 255 the largest, in base64."""
    model, tokenizer = load_model(name)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    layer = find_sites(model).layers // 2
    scores = scores_of(model, tokenizer, ids, layer)
    return {
        "layer": layer, "tokens": [tokenizer.decode([i]) for i in ids[0].tolist()],
        "ranks": {name: encoded(ranks(score, RANKED[name])[:, :CHANNELS]) for name, score in scores.items()},
    }


def scores_of(model: nn.Module, tokenizer: Any, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """Score -> its values [tokens, width] at one layer: of neurons, of inputs of down, or of inputs of gate and up."""
    plans = {make: fit(make(0.5), model, tokenizer, **CALIBRATION).tensors for make in (claws, larosa)}
    with torch.no_grad():
        g, h, x = (activations(model, kind, ids)[layer].float() for kind in ("gate", "down_in", "up_in"))
        site = find_sites(model).of_kind("up_in")[layer]
        norm = sum(model.get_submodule(path).weight.float().square().sum(0) for path in site.column_readers).sqrt()
        return {
            "gate": g.abs(), "gate_saliency": g.abs() * plans[claws][f"{layer}.gate.saliency"], "down": h.abs(),
            "down_threshold": h.abs(), "input": x.abs(), "input_threshold": x.abs(), "input_norm": x.abs() * norm,
            "input_rotated": (x @ plans[larosa][f"{layer}.up_in.rotation"].float()).abs(),
        }


def ranks(scores: Tensor, ranked: str) -> Tensor:
    """Each entry's rank among its token's ("token") or among all ("layer"), scaled to whole numbers from 0 to 255."""
    flat = scores if ranked == "token" else scores.reshape(1, -1)
    place = flat.argsort(dim=-1, stable=True).argsort(dim=-1).double() / max(1, flat.shape[-1] - 1)
    return (255 * place).round().to(torch.uint8).view(scores.shape)


def encoded(values: Tensor) -> str:
    """Bytes in base64."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
