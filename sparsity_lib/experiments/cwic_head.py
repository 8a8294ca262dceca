"""TEAL carried on to the head, which its paper leaves dense, at CWIC's ratios: how much of CWIC's lead is the head."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.experiments import cwic_small, cwic_smol
from sparsity_lib.experiments.cwic_small import measure_teal

RATIOS = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
#: Model -> text and calibration of its CWIC runs.
TEXTS = {module.MODEL: {"text": module.TEXT, "calibration": module.CALIBRATION} for module in (cwic_small, cwic_smol)}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model."""
    wanted = {name: {"teal": "head", "ratios": RATIOS, "model": name, **texts} for name, texts in TEXTS.items()}
    found = checkpoint.items([(params, partial(measure_teal, params)) for params in wanted.values()])
    return dict(zip(wanted, found, strict=True)), {"models": wanted}, [0]
