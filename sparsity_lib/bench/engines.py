"""Ways to decode one token after a prompt, as cases of one timing: ours, Hugging Face's, torch.compile's, llama.cpp's.

Each engine has `at(prompt)`, which makes a context of that many tokens, and `__call__(turn)`, which decodes one token after
it. The time of a token depends on how long the context is, not on what is in it: where reading a prompt is not the cheapest
way to fill a cache, the cache is filled with random numbers.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch._inductor.config
from torch import nn

from sparsity_lib import lm
from sparsity_lib.bench.llama import LlamaCpp
from sparsity_lib.decode import Decoder, structures
from sparsity_lib.decode.rules import PLACES
from sparsity_lib.decode.sources import MATRICES, ModelSource

#: Blocks of random weights that Hugging Face's model repeats: several hundred MB, so that no cache holds what is read, while
#: memory need not hold all blocks, and torch.compile's packed copy of each.
COPIES = 4


class Engine(Protocol):
    """What the timing needs of an engine; prompts come in rising order."""

    def at(self, prompt: int) -> None: ...

    def __call__(self, turn: int) -> Any: ...


class Ours:
    """A decoder of this library, its cache filled with random numbers."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.prompt = decoder, 0
        decoder.cache.normal_()

    def at(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, turn: int) -> torch.Tensor:
        self.decoder.position = self.prompt
        return self.decoder.step(100 + turn)


def sharing(decoder: Decoder, densities: Mapping[str, float]) -> Decoder:
    """A decoder of the same weights and cache that keeps other shares of its sites' inputs: a second copy would not fit."""
    a, other = decoder.architecture, copy.copy(decoder)
    widths = {"qkv_in": a.hidden, "o_in": a.heads * a.head_dim, "up_in": a.hidden, "down_in": a.neurons}
    layers = (structures.Layer * a.layers)()
    ctypes.memmove(layers, decoder._model.layers, ctypes.sizeof(layers))
    for layer in layers:
        for site, density in densities.items():
            getattr(layer, PLACES[site]).select.k = round(density * widths[site])
    other._model = structures.Model.from_buffer_copy(decoder._model)
    other._model.layers = ctypes.cast(layers, ctypes.POINTER(structures.Layer))
    other._alive = [*decoder._alive, layers]
    return other


class Eager:
    """Hugging Face's forward with the cache that it makes by itself, which grows by a token a call."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, None

    def at(self, prompt: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        _fill(self.cache, self.model, prompt)

    def __call__(self, turn: int) -> torch.Tensor:
        token = torch.tensor([[100 + turn]])
        return self.model(input_ids=token, **lm.with_cache(self.model, self.cache)).logits[0, -1]


class Compiled:
    """torch.compile of Hugging Face's forward with a static cache, as large as the text that is being written."""

    def __init__(self, model: nn.Module, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.forward, self.cache, self.arguments, self.prompt = None, None, {}, 0

    @torch.inference_mode()
    def at(self, prompt: int) -> None:
        from transformers import StaticCache

        torch._dynamo.reset()  # another length is another program
        self.forward = torch.compile(self.model.forward, dynamic=False)
        self.cache, self.prompt = StaticCache(config=self.model.config, max_cache_len=prompt + self.new_tokens), prompt
        self.arguments = lm.with_cache(self.model, self.cache)
        _fill(self.cache, self.model, prompt)
        with torch._inductor.config.patch(freezing=True):  # weights packed for oneDNN: the fastest of inductor's ways here
            for turn in range(3):  # compiling is not what is timed
                self(turn)

    def __call__(self, turn: int) -> torch.Tensor:
        for layer in self.cache.layers:  # the same length each time: nothing to compile anew
            layer.cumulative_length.fill_(self.prompt)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.prompt
        token = torch.tensor([[100 + turn]])
        return self.forward(input_ids=token, **self.arguments).logits[0, -1]


class Llama:
    """llama.cpp; it reads the prompt itself, on from the last one."""

    def __init__(self, model: LlamaCpp) -> None:
        self.model, self.prompt = model, 0

    def at(self, prompt: int) -> None:
        self.model.rewind(min(prompt, self.prompt))
        if prompt > self.model.position:
            self.model.read([100 + i % 1000 for i in range(prompt - self.model.position)])
        self.prompt = prompt

    def __call__(self, turn: int) -> torch.Tensor:
        self.model.rewind(self.prompt)
        return self.model.read([100 + turn])


def _fill(cache: Any, model: nn.Module, tokens: int) -> None:
    """Random keys and values of so many tokens, layer by layer, through the cache's own door."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, tokens, head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype), layer)


def hugging_face(source: ModelSource, config: Any = None) -> nn.Module:
    """The model of a source: its own, or for random weights one of the whole shape, made here of COPIES blocks in turn."""
    if config is None:
        return source.model
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    model.base_model.embed_tokens.weight = _parameter(source.embedding())
    model.base_model.norm.weight = _parameter(source.final_norm().to(source.dtype))
    model.tie_weights()
    for i, block in enumerate(model.base_model.layers):
        norms = source.norms(i)
        block.input_layernorm.weight = _parameter(norms["norm_attention"].to(source.dtype))
        block.post_attention_layernorm.weight = _parameter(norms["norm_ffn"].to(source.dtype))
        for name in MATRICES:
            linear = _linear(block, name)
            earlier = _linear(model.base_model.layers[i % COPIES], name)
            linear.weight = earlier.weight if i >= COPIES else _parameter(source.matrix(i, name))
    return model.eval()


def _linear(block: nn.Module, name: str) -> nn.Linear:
    return getattr(block.self_attn if name in "qkvo" else block.mlp, f"{name}_proj")


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
