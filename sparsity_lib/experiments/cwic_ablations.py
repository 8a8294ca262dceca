"""CWIC's parts taken out one at a time, on the small Llama, along a short schedule to 6x."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.experiments.cwic_common import run_of, spec
from sparsity_lib.experiments.cwic_small import MODEL, RATE, STRIPE, stripes

#: 204,800 tokens a run.
TRAIN = {"steps": 400, "batch": 4, "length": 128}
TEXT = {"sequences": 16, "length": 256}
#: Thresholds at the weights' own rate: eta sqrt(n) = 1 for the 128 inputs that all matrices have.
PLAIN_RATE = 128**-0.5
#: Name -> (loss, seeds, changes to the run). What comes without changes is compared with. One seed for what no paper reports.
ABLATIONS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "active": ("active", (0, 1, 2), {}),
    "no stripes": ("active", (0, 1, 2), {"stripe": None}),
    "MSE of hidden states": ("active", (0, 1, 2), {"mse": 1.0}),
    "no straight-through": ("active", (0, 1, 2), {"config": {"straight_through": False}}),
    "no normalisation": ("active", (0, 1, 2), {"config": {"normalise": False}}),
    "no warm-up": ("active", (0, 1, 2), {"budget": {"warmup": 0}}),
    "head limit": ("active", (0,), {"budget": {"head_limit": 10.0}}),
    "dense head": ("active", (0,), {"config": {"head": False}}),
    "released statistics": ("active", (0,), {"config": {"statistics": "released"}}),
    "eta sqrt(n) = 1": ("active", (0, 1, 2), {"eta": PLAIN_RATE}),
    "eta 3": ("active", (0,), {"eta": 3.0}),
    "stripes of 16": ("active", (0, 1, 2), {"stripe": stripes(16)}),
    "stripes of 64": ("active", (0, 1, 2), {"stripe": stripes(64)}),
    "bandwidth 0.02": ("active", (0, 1, 2), {"config": {"bandwidth": 0.02}}),
    "bandwidth 0.05": ("active", (0, 1, 2), {"config": {"bandwidth": 0.05}}),
    "bandwidth 0.25": ("active", (0, 1, 2), {"config": {"bandwidth": 0.25}}),
    "bandwidth 0.5": ("active", (0, 1, 2), {"config": {"bandwidth": 0.5}}),
    "momentum 0.9": ("active", (0, 1, 2), {"config": {"momentum": 0.9}}),
    "momentum 0.95": ("active", (0, 1, 2), {"config": {"momentum": 0.95}}),
    "triangle kernel": ("active", (0, 1, 2), {"config": {"kernel": "triangle"}}),
    "gaussian kernel": ("active", (0, 1, 2), {"config": {"kernel": "gaussian"}}),
    "flops": ("flops", (0, 1, 2), {}),
    "flops, no stripes": ("flops", (0, 1, 2), {"stripe": None}),
    "flops, no warm-up": ("flops", (0, 1, 2), {"budget": {"warmup": 0}}),
    "flops, no head limit": ("flops", (0, 1, 2), {"budget": {"head_limit": None}}),
    "flops, no normalisation": ("flops", (0, 1, 2), {"config": {"normalise": False}}),
}
#: Papers' scores with a part and without it, at 2x to 6x: the seven tasks' mean of the active-parameter version (its table 3
#: and 4; "No MSE" is described as a run with the MSE), ARC of the FLOP version (its table 3).
PUBLISHED = {
    "active": (49.2, 47.5, 46.1, 44.2, 43.8),
    "no stripes": (48.0, 45.8, 45.2, 43.9, 42.4),
    "MSE of hidden states": (48.3, 45.9, 45.6, 45.0, 44.4),
    "flops": (47.5, 44.1, 38.5, 37.2, 32.1),
    "flops, no warm-up": (22.4, 22.4, 22.4, 22.4, 22.4),
    "flops, no head limit": (29.8, 26.0, 25.7, 25.7, 25.7),
    "flops, no normalisation": (41.3, 42.4, 37.3, 33.6, 29.1),
    "flops, no stripes": (31.2, 25.7, 24.7, 23.5, 21.2),
}


def runs() -> dict[str, dict[str, Any]]:
    """Name and seed -> run."""
    found = {}
    for name, (loss, seeds, changes) in ABLATIONS.items():
        options = {"stripe": stripes(STRIPE), **changes}
        for seed in seeds:
            found[f"{name} {seed}"] = spec(MODEL, loss, text=TEXT, **TRAIN, rate=RATE[loss], seed=seed, **options)
    return found


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a run."""
    wanted = runs()
    found = checkpoint.items([({"run": name, **params}, partial(run_of, params)) for name, params in wanted.items()])
    data: dict[str, Any] = {}
    for name, (_, seeds, _) in ABLATIONS.items():
        data[name] = {str(seed): found[list(wanted).index(f"{name} {seed}")] for seed in seeds}
    return data, {"runs": wanted}, [0, 1, 2]
