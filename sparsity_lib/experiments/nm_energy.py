"""How much of an activation's square norm each pattern keeps, on real activations of both models, layer by layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsity_lib.assets.models import load_model
from sparsity_lib.experiments import common
from sparsity_lib.experiments.nm_common import PATTERNS, UNSTRUCTURED, density
from sparsity_lib.observe import activations
from sparsity_lib.parts.nm import n_of_m_mask, pattern_of
from sparsity_lib.parts.select import exact_topk

SITES = ("qkv_in", "o_in", "up_in", "down_in")
TEXT = {"sequences": 4, "length": 256}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model."""
    params = {"sites": SITES, "text": TEXT, "patterns": (*PATTERNS, UNSTRUCTURED)}
    found = checkpoint.items([({"model": name, **params}, partial(_measure, name)) for name in common.MODELS])
    return dict(zip(common.MODELS, found, strict=True)), params, [0]


def _measure(name: str) -> dict[str, Any]:
    model, tokenizer = load_model(name)
    ids = common.evaluation_ids(tokenizer, **TEXT)
    found: dict[str, Any] = {}
    for site in SITES:
        layers = activations(model, site, ids)
        found[site] = {pattern: [retained(x, pattern) for x in layers] for pattern in (*PATTERNS, UNSTRUCTURED)}
        found[site]["kurtosis"] = [kurtosis(x) for x in layers]
    return found


def retained(x: Tensor, pattern: str) -> float:
    """Share of the square norm that a pattern keeps by magnitude, mean over tokens; x [tokens, width]."""
    size = x.float().abs()
    if pattern.endswith("%"):
        mask = exact_topk(size, round(density(pattern) * x.shape[-1]))
    else:
        mask = n_of_m_mask(size, *pattern_of(pattern))
    square = size.double().square()
    return float(((square * mask).sum(-1) / square.sum(-1).clamp_min(1e-300)).mean())


def kurtosis(x: Tensor) -> float:
    """Fourth moment over the square of the second, of all entries: 3 for a Gaussian, 6 for a Laplace distribution."""
    centred = x.double() - x.double().mean()
    return float(centred.pow(4).mean() / torch.clamp(centred.square().mean(), min=1e-300).square())
