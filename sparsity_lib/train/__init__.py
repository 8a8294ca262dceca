"""Training: LoRA recovery of a sparse model."""

from sparsity_lib.train.lora import LoraRecipe, recover

__all__ = ["LoraRecipe", "recover"]
