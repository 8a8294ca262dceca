"""How fast weights may learn on SmolLM2 where tokens are few: thresholds at the same rate throughout, weights at several."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.cwic.shipped import SMOLLM2_STRIPES
from sparsity_lib.experiments.cwic_common import run_of, spec
from sparsity_lib.experiments.cwic_smol import MODEL, MODES, SHAPE, TEXT

#: Mode -> rates of its weights or adapters. Thresholds alone, at the same rate of theirs, are `cwic_smol`'s.
RATES = {"all": (1e-5, 1e-4), "lora": (1e-4,)}
FINAL = 3.0


def runs() -> dict[str, dict[str, Any]]:
    """Name -> run: steps, text, target and the thresholds' rate of "thresholds 3x"; eta is what keeps the latter."""
    steps, rate, eta = MODES["thresholds"]
    return {
        f"{mode} {own:g}": spec(MODEL, text=TEXT, stripe=SMOLLM2_STRIPES, mode=mode, final=FINAL, steps=steps, rate=own,
                                eta=round(rate * eta / own, 6), **SHAPE)
        for mode, rates in RATES.items() for own in rates}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a run."""
    wanted = runs()
    found = checkpoint.items([({"run": name, **params}, partial(run_of, params)) for name, params in wanted.items()])
    return dict(zip(wanted, found, strict=True)), {"runs": wanted, "rates": RATES}, [0]
