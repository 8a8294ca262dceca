"""What a decoder needs to know about a model besides its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sparsity_lib.errors import SparsityError

#: Model types whose blocks the decoder computes exactly.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
#: Rotations that do not depend on how long the text is.
STATIC_ROTATIONS = ("default", "linear", "yarn", "llama3")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class Architecture:
    """Sizes and constants of a Llama-like decoder. `windows`: tokens each layer's attention looks back, 0 for all."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int
    activation: str
    eps: float
    scaling: float
    embedding_scale: float
    attention_cap: float
    logit_cap: float
    windows: tuple[int, ...]
    kinds: tuple[str, ...]

    @staticmethod
    def of(config: PretrainedConfig) -> Architecture:
        """Read a configuration of transformers.

        Raises
        ------
        SparsityError
            For a model type that the decoder does not know.
        """
        config = config.get_text_config()
        if config.model_type not in KNOWN:
            raise SparsityError(
                f"The decoder does not know model type {config.model_type!r}: expected one of {', '.join(KNOWN)}. "
                "Fix: use model.generate, which every model has."
            )
        gemma = config.model_type.startswith("gemma")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = tuple(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
        window = getattr(config, "sliding_window", None) or 0
        if config.model_type == "mistral":
            windows = (window,) * len(kinds)
        else:
            windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        if getattr(config, "use_bidirectional_attention", False):
            raise SparsityError("The decoder's attention looks back only, this model's both ways. Fix: use model.generate.")
        for kind in _rope_types(config):
            if kind not in STATIC_ROTATIONS:
                raise SparsityError(f"The decoder does not know rotations of type {kind!r}. Fix: use model.generate.")
        if activation not in _ACTIVATIONS:
            raise SparsityError(f"The decoder does not know the activation {activation!r}. Fix: use model.generate.")
        return Architecture(
            layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, head_dim=head_dim, neurons=config.intermediate_size,
            vocabulary=config.vocab_size, activation=_ACTIVATIONS[activation], eps=config.rms_norm_eps,
            scaling=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
            embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
            attention_cap=(getattr(config, "attn_logit_softcapping", None) or 0.0) if gemma else 0.0,
            logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0, windows=windows, kinds=kinds)


def _rope_types(config: PretrainedConfig) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    return [group.get("rope_type", "default") for group in groups]


def rotations(rotary: nn.Module, kinds: tuple[str, ...], capacity: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Tables (cosine, sine) [capacity, head_dim] in float32 for each kind of layer, from the model's own module."""
    positions, like = torch.arange(capacity)[None], torch.zeros(1, dtype=torch.float32)
    found = {}
    for kind in dict.fromkeys(kinds):
        try:
            cosine, sine = rotary(like, positions, kind)
        except TypeError:
            cosine, sine = rotary(like, positions)
        found[kind] = (cosine[0].float().contiguous(), sine[0].float().contiguous())
    return found
