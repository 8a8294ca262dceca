"""What the CLAWS chapter's live runs and full-size runs share: the models, the methods, the texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib.assets.models import load_model
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.fit import fit_many
from sparsity_lib.methods import METHODS, VARIANTS, claws
from sparsity_lib.methods.larosa import density_for_share, larosa
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.sweep import kept_open

MODELS = ("smollm2-135m-instruct", "gemma3-270m")
DENSITIES = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
#: Calibration: 16 sequences of 512 tokens from all calibration sources, the same for every method.
CALIBRATION = {"tokens": 8192, "length": 512, "seed": 0}


class Opened:
    """A model calibrated in float32 (`fitted`) and run in the dtype of a table (`model`), and its tokenizer."""

    def __init__(self, name: str, dtype: str) -> None:
        self.fitted, self.tokenizer = load_model(name)
        self.model, _ = load_model(name, dtype=dtype_named(dtype))
        self._last: tuple[str, Any] = ("", None)

    def once(self, made_from: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, kept until something made from other (plain) data is asked for: items that follow share it."""
        key = json.dumps(made_from, sort_keys=True)
        if self._last[0] != key:
            self._last = (key, make())
        return self._last[1]


@kept_open
def opened(name: str, dtype: str) -> Opened:
    """The one that is kept open for the items that follow."""
    return Opened(name, dtype)


@kept_open
def in_float32(name: str) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, kept open likewise where it runs as it is calibrated."""
    return load_model(name)


def recipe_at(method: str, density: float, model: nn.Module) -> Recipe:
    """A method at an FFN density; those on linear inputs at the density that skips as many of all weights as a gate-site one.

    `method` is a name of METHODS, "claws_VARIANT", or "larosa_coefficients" for the release's 0.8 and 1.2.
    """
    if method.startswith("claws_"):
        return claws(density, variant=method.removeprefix("claws_"))
    if method == "larosa_coefficients":
        make = partial(larosa, inputs=0.8, outputs=1.2)
    else:
        make = METHODS[method]
    if method not in ("larosa", "larosa_coefficients", "inputs_topk"):
        return make(density)
    return make(density_for_share(make, model, skipped_by_gate(model, density)))


def skipped_by_gate(model: nn.Module, density: float) -> float:
    """Share of all weights that a gate-site method skips at an FFN density."""
    from sparsity_lib.accounting import weights_per_token
    from sparsity_lib.sites import find_sites

    return claws(density).skipped(find_sites(model), weights_per_token(model))


def fit_methods(
    model: nn.Module, tokenizer, methods: Sequence[str], densities: Sequence[float], **calibration
) -> dict[tuple[str, float], Plan]:
    """Fit every method at every density in shared passes over one calibration text."""
    wanted = [(method, density) for method in methods for density in densities]
    recipes = [recipe_at(method, density, model) for method, density in wanted]
    return dict(zip(wanted, fit_many(recipes, model, tokenizer, **{**CALIBRATION, **calibration}), strict=True))


def evaluation_ids(tokenizer, sequences: int, length: int, seed: int = 0) -> Tensor:
    """Evaluation text as [sequences, length]."""
    return token_sequences(tokenizer, "evaluation", tokens=sequences * length, length=length, seed=seed)


def fingerprint(ids: Tensor) -> str:
    """sha256 of token ids: shows that two runs read the same text."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()[:16]


def dtype_named(name: str) -> torch.dtype:
    """float32 or bfloat16 by name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def describe(plan: Plan) -> Mapping:
    """What identifies a fitted plan in a checkpoint item."""
    return {"recipe": plan.recipe.to_json(), "calibration": dict(plan.calibration)}


__all__ = [
    "CALIBRATION", "DENSITIES", "MODELS", "VARIANTS", "Opened", "describe", "dtype_named", "evaluation_ids", "fingerprint",
    "fit_methods", "in_float32", "opened", "recipe_at", "skipped_by_gate",
]
