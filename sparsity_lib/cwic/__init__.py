"""CWIC: learned granular sparsity (Compute Where It Counts, both versions of the paper).

    teacher = teacher_of(model)
    registry = convert(model, CWICConfig(stripe=64))
    train_cwic(model, teacher, rows, CWICRecipe(TrainRecipe(...), budget.active(steps, final=3.0)))
"""

from sparsity_lib.cwic.activity import Activity, measure
from sparsity_lib.cwic.budget import ETA, PRESETS, Budget
from sparsity_lib.cwic.config import CWICConfig
from sparsity_lib.cwic.convert import Registry, convert, registry_of
from sparsity_lib.cwic.export import load_thresholds, save_thresholds
from sparsity_lib.cwic.history import StepRecord
from sparsity_lib.cwic.train import CWICRecipe, CWICTrained, teacher_of, train_cwic

__all__ = [
    "ETA", "PRESETS", "Activity", "Budget", "CWICConfig", "CWICRecipe", "CWICTrained", "Registry", "StepRecord", "convert",
    "load_thresholds", "measure", "registry_of", "save_thresholds", "teacher_of", "train_cwic",
]
