"""Where a decoder's numbers come from: a Hugging Face model, or random ones of a given shape for timing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sparsity_lib.decode.architecture import Architecture, rotations
from sparsity_lib.errors import SparsityError
from sparsity_lib.stored import refuse_streamed

if TYPE_CHECKING:
    from sparsity_lib.decode.granular import Granular
    from sparsity_lib.decode.rules import Choice

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class ModelSource:
    """Weights of a Hugging Face decoder."""

    #: Modules whose weights are all there is to them.
    linears: tuple[type[nn.Module], ...] = (nn.Linear,)

    def __init__(self, model: nn.Module) -> None:
        refuse_streamed(model, "The decoder")
        self.architecture = Architecture.of(model.config)
        self.model, self.core = model, model.base_model
        self._plus_one = model.config.get_text_config().model_type.startswith("gemma")

    def matrix(self, layer: int, name: str) -> Tensor:
        """A projection [out, in]."""
        return self._linear(layer, name).weight

    def bias(self, layer: int, name: str) -> Tensor | None:
        return self._linear(layer, name).bias

    def _linear(self, layer: int, name: str) -> nn.Linear:
        block = self.core.layers[layer]
        found = getattr(block.self_attn if name in "qkvo" else block.mlp, f"{name}_proj")
        if type(found) not in self.linears:  # an adapter's own weights would be left out
            kind = type(found).__name__
            raise SparsityError(f"{name}_proj of block {layer} is a {kind}, not a Linear. Fix: merge adapters first.")
        return found

    def granular(self, layer: int, name: str) -> Granular | None:
        """The stripes of a projection; None where it is one piece."""
        return None

    def granular_head(self) -> Granular | None:
        return None

    def choice(self, layer: int, site: str, width: int) -> Choice | None:
        """What the model itself drops at a site, without any plan."""
        return None

    def norms(self, layer: int) -> dict[str, Tensor | None]:
        """Multipliers of the block's norms by the names of structures.Layer."""
        block = self.core.layers[layer]
        gemma = hasattr(block, "pre_feedforward_layernorm")
        places = {
            "norm_attention": block.input_layernorm,
            "norm_after_attention": block.post_attention_layernorm if gemma else None,
            "norm_ffn": block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm,
            "norm_after_ffn": block.post_feedforward_layernorm if gemma else None,
            "norm_q": getattr(block.self_attn, "q_norm", None), "norm_k": getattr(block.self_attn, "k_norm", None),
        }
        return {name: None if module is None else self._norm(module) for name, module in places.items()}

    def _norm(self, module: nn.Module) -> Tensor:
        weight = module.weight.detach().float()
        return (1 + weight if self._plus_one else weight.clone()).contiguous()

    def final_norm(self) -> Tensor:
        return self._norm(self.core.norm)

    def embedding(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    def head(self) -> Tensor | None:
        """The head [vocabulary, hidden], None where it is the embedding."""
        head = self.model.get_output_embeddings().weight
        return None if head is self.embedding() else head

    def rotations(self, capacity: int) -> dict[str, tuple[Tensor, Tensor]]:
        return rotations(self.core.rotary_emb, self.architecture.kinds, capacity)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding().dtype


class RandomSource(ModelSource):
    """Random weights of a configuration's shape, made when asked for: speed does not depend on what they are."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        from transformers import AutoModelForCausalLM

        self.architecture = Architecture.of(config)
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": 1, "layer_types": None, "vocab_size": 8})
        self.model = AutoModelForCausalLM.from_config(config)  # one block of it: norms and rotations
        self.core, self._dtype = self.model.base_model, dtype
        self._plus_one = config.get_text_config().model_type.startswith("gemma")
        self._block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def _random(self, rows: int, cols: int) -> Tensor:
        found = self._block.repeat(-(-rows * cols // len(self._block)))[: rows * cols].view(rows, cols)
        return found.mul_(cols**-0.5)

    def matrix(self, layer: int, name: str) -> Tensor:
        a = self.architecture
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        shapes = {"q": (q, a.hidden), "k": (kv, a.hidden), "v": (kv, a.hidden), "o": (a.hidden, q), "gate": (a.neurons, a.hidden),
                  "up": (a.neurons, a.hidden), "down": (a.hidden, a.neurons)}
        return self._random(*shapes[name])

    def bias(self, layer: int, name: str) -> Tensor | None:
        return None

    def norms(self, layer: int) -> dict[str, Tensor | None]:
        return super().norms(0)

    def embedding(self) -> Tensor:
        return self._random(self.architecture.vocabulary, self.architecture.hidden)

    def head(self) -> Tensor | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype
