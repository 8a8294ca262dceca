"""Mixtures of experts as modules: how they are told, whether they are laid out as the library knows them, what they hold."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps the experts of a mixture as stacked [expert, out, in] parameters."""
    return all(getattr(getattr(module, n, None), "ndim", 0) == 3 for n in ("gate_up_proj", "down_proj"))


def plain_experts(experts: nn.Module) -> bool:
    """Whether each expert is down(act(gate(x)) * up(x)) on [gate; up] stacked as [out, in], without biases or extras."""
    gating = getattr(type(experts), "_apply_gate", None)  # transformers' own, unless the model brings another
    odd = any(getattr(experts, name, False) for name in ("is_transposed", "has_bias", "has_post_expert_norm"))
    _, double, width = experts.gate_up_proj.shape
    shaped = getattr(experts, "is_concatenated", False) and tuple(experts.down_proj.shape[1:]) == (width, double // 2)
    return shaped and not odd and getattr(gating, "__name__", "") == "_default_apply_gate"


def weights_in(module: nn.Module) -> int:
    """Weights of the linear layers and the experts inside a module."""
    linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, Conv1D)))
    return linear + sum(e.gate_up_proj.numel() + e.down_proj.numel() for e in module.modules() if is_experts(e))
