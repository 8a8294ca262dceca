"""TEAL carried on to the head, which its paper leaves dense, at CWIC's ratios: how much of CWIC's lead is the head.

Once with the book's calibration text, and once with the text that CWIC was trained on, which is closer to the evaluation's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.experiments import cwic_small, cwic_smol
from sparsity_lib.experiments.cwic_common import SOURCES
from sparsity_lib.experiments.cwic_small import measure_teal

#: As asked for; thresholds fitted on dense inputs drop more of what sparse layers pass on, so that more is reached.
RATIOS = (1.5, 1.9, 2.25, 2.5, 2.9, 3.5, 4.0, 5.0, 6.0)
#: Model -> text and calibration of its CWIC runs.
TEXTS = {module.MODEL: {"text": module.TEXT, "calibration": module.CALIBRATION} for module in (cwic_small, cwic_smol)}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and calibration text."""
    wanted = {}
    for name, texts in TEXTS.items():
        shared = {"teal": "head", "ratios": RATIOS, "model": name, **texts}
        wanted[name] = {"head": shared, "head, training text": {**shared, "sources": SOURCES}}
    each = [params for ways in wanted.values() for params in ways.values()]
    found = iter(checkpoint.items([(params, partial(measure_teal, params)) for params in each]))
    return {name: {way: next(found) for way in ways} for name, ways in wanted.items()}, {"models": wanted}, [0]
