"""Training: one loop for any module and loss, and LoRA recovery of a sparse model."""

from sparsity_lib.train.lora import LoraRecipe, recover
from sparsity_lib.train.recipe import TrainRecipe
from sparsity_lib.train.trainer import Trained, train

__all__ = ["LoraRecipe", "TrainRecipe", "Trained", "recover", "train"]
