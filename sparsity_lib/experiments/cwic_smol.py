"""CWIC on SmolLM2-135M: thresholds alone, thresholds with LoRA, everything along the whole schedule, and TEAL.

The papers distil with 0.8 to 1 billion tokens. Here a run sees some ten thousand, so that what is learned well is what needs
few: the thresholds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.cwic.shipped import SMOLLM2_STRIPES
from sparsity_lib.experiments.cwic_common import run_of, spec
from sparsity_lib.experiments.cwic_small import measure_teal

MODEL = "smollm2-135m-instruct"
TEXT = {"sequences": 12, "length": 256}
#: A checkpoint every few steps: a step takes some seconds.
SHAPE = {"batch": 2, "length": 256, "checkpoint": 10}
#: mode -> steps, learning rate and eta; thresholds learn at eta sqrt(n) = 24 eta times the rate, so that two standard
#: deviations lie within reach of each run, and the weights of "all" move little.
MODES = {"thresholds": (110, 1e-3, 1.0), "lora": (80, 5e-4, 2.0), "all": (130, 1e-4, 8.0)}
TEAL = (1.5, 2.0, 2.5, 3.0, 3.5)
CALIBRATION = {"tokens": 8192, "length": 512}
SEARCH = {"tokens": 1024, "length": 256, "highest": 0.99}
#: Tokens that the papers trained with.
PUBLISHED_TOKENS = {"active": 1_000_000_000, "flops": 800_000_000}


def runs() -> dict[str, dict[str, Any]]:
    """Name -> run."""
    def one(mode: str, final: float, **more: Any) -> dict[str, Any]:
        steps, rate, eta = MODES[mode]
        return spec(MODEL, text=TEXT, stripe=SMOLLM2_STRIPES, mode=mode, final=final, steps=steps, rate=rate, eta=eta, **SHAPE,
                    **more)

    return {
        "thresholds 2x": one("thresholds", 2.0, keep="smollm2-cwic-2x"),
        "thresholds 3x": one("thresholds", 3.0, keep="smollm2-cwic-3x"),
        "all 6x": one("all", 6.0),
        "lora 3x": one("lora", 3.0),
    }


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a run, and one a way of TEAL's."""
    wanted = [({"run": name, **params}, partial(run_of, params)) for name, params in runs().items()]
    ways = {way: {"teal": way, "ratios": TEAL, "text": TEXT, "calibration": CALIBRATION, "search": SEARCH, "model": MODEL}
            for way in ("uniform", "greedy")}
    wanted += [(params, partial(measure_teal, params)) for params in ways.values()]
    found = checkpoint.items(wanted)
    names = list(runs())
    data = {"runs": dict(zip(names, found, strict=False)), "teal": dict(zip(ways, found[len(names) :], strict=True))}
    data["files"] = {params["keep"]: data["runs"][name].pop("files") for name, params in runs().items() if "keep" in params}
    return data, {"runs": runs(), "teal": ways}, [0]
