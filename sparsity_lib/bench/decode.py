"""Tokens per second of whole models: dense and sparse, against what the bytes that are read predict."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch

from sparsity_lib.assets.models import load_model
from sparsity_lib.bench.timing import ReadBandwidth, interleaved
from sparsity_lib.decode import Decoder, RandomSource
from sparsity_lib.decode.rules import Choice

REAL = ("smollm2-135m-instruct", "gemma3-270m")
#: Shapes of Llama 3.2, read from their published configurations.
SHAPES = {
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "Llama-3.2-3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                     "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
}
PROMPTS = (256, 512, 1024, 2048)
TOKENS = 24
#: Name -> densities by site, imposed by rank so that they hold exactly.
SETTINGS = {
    "dense": {},
    "neurons 50%": {"gate": 0.5},
    "inputs 50%": {"qkv_in": 0.5, "o_in": 0.5, "up_in": 0.5, "down_in": 0.5},
    "inputs 35%": {"qkv_in": 0.35, "o_in": 0.35, "up_in": 0.35, "down_in": 0.35},
}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and setting."""
    data: dict[str, Any] = {}
    for name in (*REAL, *SHAPES):
        for setting, densities in SETTINGS.items():
            params = {"model": name, "densities": densities, "prompts": PROMPTS, "tokens": TOKENS}
            data.setdefault(name, {})[setting] = checkpoint.item(params, partial(measure, name, densities))
        if name in REAL:
            data[name]["HF eager"] = checkpoint.item({"model": name, "engine": "eager", "prompts": PROMPTS}, partial(eager, name))
        print(table(name, data[name]), flush=True)
    return data, {"settings": SETTINGS, "prompts": PROMPTS, "tokens": TOKENS, "threads": torch.get_num_threads()}, [0]


def measure(name: str, densities: dict[str, float]) -> dict[str, Any]:
    """Seconds a token after prompts of several lengths, and bytes of weights read."""
    def choose(layer: int, site: str, width: int) -> Choice | None:
        return Choice(k=round(densities[site] * width)) if site in densities else None

    capacity = max(PROMPTS) + TOKENS
    decoder = Decoder(_source(name), choices=choose, capacity=capacity)
    decoder.cache.normal_()
    bandwidth = ReadBandwidth()
    found: dict[str, Any] = {"prompts": {}}
    for prompt in PROMPTS:
        seconds = []
        for token in range(TOKENS):
            decoder.position = prompt + token
            start = time.perf_counter()
            decoder.step(100 + token)
            seconds.append(time.perf_counter() - start)
        found["prompts"][str(prompt)] = median(seconds[4:])
    speed = bandwidth.bytes / interleaved({"read": bandwidth}, 9, desc="bandwidth")["read"].median
    found.update(bytes=decoder.bytes_read, bandwidth=speed)
    return found


def _source(name: str):
    if name in REAL:
        model, _ = load_model(name, dtype=torch.bfloat16)
        return model
    from transformers import LlamaConfig

    return RandomSource(LlamaConfig(**SHAPES[name], rope_theta=500000.0, tie_word_embeddings=True))


@torch.inference_mode()
def eager(name: str) -> dict[str, Any]:
    """Seconds a token of Hugging Face's own forward in bfloat16."""
    model, _ = load_model(name, dtype=torch.bfloat16)
    found: dict[str, Any] = {"prompts": {}}
    for prompt in PROMPTS:
        cache = model(input_ids=torch.full((1, prompt), 100), use_cache=True, logits_to_keep=1).past_key_values
        seconds = []
        for token in range(12):
            start = time.perf_counter()
            cache = model(input_ids=torch.tensor([[100 + token]]), past_key_values=cache, use_cache=True).past_key_values
            seconds.append(time.perf_counter() - start)
        found["prompts"][str(prompt)] = median(seconds[3:])
    return found


def table(name: str, found: dict[str, Any]) -> str:
    """The figures of one model as text: tokens a second, speed-up over our dense, and over what the bytes predict."""
    lines = [f"{name}: tokens per second after prompts of {', '.join(map(str, PROMPTS))} tokens"]
    dense = found["dense"]
    for setting, each in found.items():
        rates = "  ".join(f"{1 / seconds:7.1f}" for seconds in each["prompts"].values())
        text = f"  {setting:12} {rates}"
        if "bytes" in each:
            first = str(PROMPTS[0])
            gain = dense["prompts"][first] / each["prompts"][first]
            share = each["bytes"] / each["prompts"][first] / each["bandwidth"]
            predicted = dense["bytes"] / each["bytes"]
            text += f"   {gain:.2f}x of dense, bytes predict {predicted:.2f}x; {100 * share:.0f}% of bandwidth"
        lines.append(text)
    return "\n".join(lines)
