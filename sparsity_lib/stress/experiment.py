"""All trials as one result, `results/stress.json`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

from sparsity_lib import stress
from sparsity_lib.results import Checkpoint
from sparsity_lib.stress import base

NAME, SEED = "stress", 0
#: Modules without trials.
_HELPERS = ("__main__", "experiment", "page", "base")


def gather() -> None:
    """Import every module of the package, each of which registers its trials."""
    for module in sorted(found.name for found in pkgutil.iter_modules(stress.__path__)):
        if module not in _HELPERS:
            importlib.import_module(f"{stress.__name__}.{module}")


def run(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any], list[int]]:
    """The registered experiment: every trial at full size."""
    from sparsity_lib.stress.__main__ import said

    found = []
    for trial in base.find([]):
        each = checkpoint.item({"trial": trial.name, "seed": SEED}, lambda trial=trial: base.run(trial, "full", SEED))
        print(said(each), file=sys.stderr, flush=True)
        found.append(each)
    return {"trials": found}, {"size": "full"}, [SEED]


gather()
