"""The FLOP version without its limit for the head, along the whole schedule: on the ablations' short one it is never reached."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.experiments.cwic_common import run_of, spec
from sparsity_lib.experiments.cwic_small import MODEL, RATE, SEEDS, STRIPE, TEXT, TRAIN, stripes


def runs() -> dict[str, dict[str, Any]]:
    """Seed -> run: `cwic_small`'s of the FLOP loss but for the limit."""
    return {str(seed): spec(MODEL, "flops", text=TEXT, stripe=stripes(STRIPE), **TRAIN, rate=RATE["flops"], seed=seed,
                            budget={"head_limit": None}) for seed in SEEDS}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a seed."""
    wanted = runs()
    found = checkpoint.items([({"limit": "none", **params}, partial(run_of, params)) for params in wanted.values()])
    return dict(zip(wanted, found, strict=True)), {"runs": wanted}, list(SEEDS)
