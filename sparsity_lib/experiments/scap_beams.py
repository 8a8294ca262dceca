"""What concurrently decoded sequences need together: real beams, and batches of different texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib.assets.models import load_model
from sparsity_lib.attach import attach
from sparsity_lib.experiments import common, scap_common
from sparsity_lib.fit import fit
from sparsity_lib.install import installed
from sparsity_lib.plan import Plan
from sparsity_lib.sites import DOWN_IN, UP_IN, find_sites
from sparsity_lib.sweep import kept_open

MODEL = "smollm2-135m-instruct"
WIDTHS = (1, 2, 4, 8)
#: Half of the inputs, as in bench/batch.
POINT = {"method": "scap", "up": 0.5, "down": 0.5}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 32


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a width and kind of concurrency."""
    wanted = [{"model": MODEL, "kind": kind, "width": width, "point": POINT, "prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS,
               "new_tokens": NEW_TOKENS, "calibration": common.CALIBRATION} for kind in ("beams", "texts") for width in WIDTHS]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_measure, params)) for params in wanted]), strict=True):
        data.setdefault(params["kind"], {})[str(params["width"])] = found
        print(f"{params['kind']} {params['width']} {found['down_in']['needed']}", flush=True)
    return data, {"model": MODEL, "widths": WIDTHS, "point": POINT, "prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS,
                  "new_tokens": NEW_TOKENS, "calibration": common.CALIBRATION}, [0]


@kept_open
def _opened(name: str, point: dict, calibration: dict, prompts: int, tokens: int) -> tuple[nn.Module, Any, Plan, Tensor]:
    """The model, its tokenizer, the point's plan, and the prompts."""
    model, tokenizer = load_model(name)
    plan = fit(scap_common.recipe_of(point), model, tokenizer, **calibration)
    return model, tokenizer, plan, common.evaluation_ids(tokenizer, prompts, tokens)


def _measure(params: dict) -> dict[str, Any]:
    model, tokenizer, plan, ids = _opened(*(params[key] for key in ("model", "point", "calibration", "prompts", "prompt_tokens")))
    width, beams = params["width"], params["kind"] == "beams"
    options = {"max_new_tokens": params["new_tokens"], "min_new_tokens": params["new_tokens"], "do_sample": False,
               "num_beams": width if beams else 1, "pad_token_id": tokenizer.eos_token_id}
    with installed(model, plan), watched(model) as found:
        for prompt in ids.split(1 if beams else width):
            if len(prompt) == (1 if beams else width):
                model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
                for union in found.values():
                    union.cut()
    return {kind: {"needed": union.needed, "each": union.each, "by_chance": union.by_chance()} for kind, union in found.items()}


class Union:
    """Counts, over decoded steps and layers, entries that any of the sequences decoded together keeps.

    needed, each: by text (every `cut` ends one), the share that at least one sequence keeps, and that one alone keeps.
    """

    def __init__(self) -> None:
        self.needed: list[float] = []
        self.each: list[float] = []
        self._now: list[tuple[float, float]] = []
        self._often: dict[int, Tensor] = {}
        self._seen: dict[int, int] = {}
        self._size = 1

    def add(self, layer: int, kept: Tensor) -> None:
        """kept: boolean [sequences, channels] of one step at one layer."""
        self._size = len(kept)
        self._now.append((float(kept.any(0).float().mean()), float(kept.float().mean())))
        self._often[layer] = self._often.get(layer, 0) + kept.double().sum(0)
        self._seen[layer] = self._seen.get(layer, 0) + len(kept)

    def cut(self) -> None:
        """End one text."""
        for into, values in zip((self.needed, self.each), zip(*self._now, strict=True), strict=True):
            into.append(sum(values) / len(values))
        self._now = []

    def by_chance(self) -> float:
        """What `needed` would be if sequences kept each channel as often as they do, but independently of each other."""
        rates = [often / self._seen[layer] for layer, often in self._often.items()]
        return float(torch.stack([1 - (1 - rate).pow(self._size).mean() for rate in rates]).mean())


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Union]]:
    """Collect, at the inputs of a sparse model's up and down projections, what each decoded step keeps; prompts are left out."""
    found = {kind: Union() for kind in (UP_IN, DOWN_IN)}
    sites, handles = find_sites(model), []

    def tap(x: Tensor, union: Union, layer: int) -> Tensor:
        if x.shape[-2] == 1:
            union.add(layer, x[:, 0] != 0)
        return x

    try:
        for kind, union in found.items():
            for layer, site in enumerate(sites.of_kind(kind)):
                handles.append(attach(model, site, partial(tap, union=union, layer=layer)))  # after the sparsifier's own tap
        yield found
    finally:
        for handle in handles:
            handle.remove()
