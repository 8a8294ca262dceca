"""Tokens per second of whole models: dense and sparse, against what the bytes that are read predict."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch

from sparsity_lib.assets.models import load_model
from sparsity_lib.bench import baselines, llama
from sparsity_lib.bench.timing import ReadBandwidth, by_length, interleaved
from sparsity_lib.decode import Decoder, ModelSource, RandomSource
from sparsity_lib.decode.rules import Choice

REAL = ("smollm2-135m-instruct", "gemma3-270m")
#: Shapes of Llama 3.2, read from their published configurations.
SHAPES = {
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "Llama-3.2-3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                     "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
}
#: Models of which memory does not hold a copy for each engine; only these settings are measured of them.
LARGE, BASELINE_SETTINGS = ("Llama-3.2-3B",), ("inputs 35%",)
PROMPTS = (256, 512, 1024, 2048)
TOKENS = 24
#: Name -> densities by site, imposed by rank so that they hold exactly.
SETTINGS = {
    "dense": {},  # against itself: what the rounds themselves make of it
    "neurons 50%": {"gate": 0.5},
    "inputs 50%": {"qkv_in": 0.5, "o_in": 0.5, "up_in": 0.5, "down_in": 0.5},
    "inputs 35%": {"qkv_in": 0.35, "o_in": 0.35, "up_in": 0.35, "down_in": 0.35},
}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and setting."""
    data: dict[str, Any] = {}
    for name in (*REAL, *SHAPES):
        for setting, densities in SETTINGS.items():
            if name in LARGE and setting not in BASELINE_SETTINGS:
                continue
            params = {"model": name, "densities": densities, "prompts": PROMPTS, "tokens": TOKENS}
            data.setdefault(name, {})[setting] = checkpoint.item(params, partial(measure, name, densities))
        sets = baselines.APART if name in LARGE else baselines.TOGETHER
        params = {"model": name, "engines": sets, "densities": baselines.DENSITIES, "prompts": PROMPTS, "tokens": TOKENS}
        data[name]["baselines"] = checkpoint.item({**params, "llama.cpp": llama.version()}, partial(against, name, sets))
        print(table(name, data[name]), flush=True)
    params = {"settings": SETTINGS, "prompts": PROMPTS, "tokens": TOKENS, "threads": torch.get_num_threads()}
    return data, {**params, "llama.cpp": llama.version()}, [0]


def measure(name: str, densities: dict[str, float]) -> dict[str, Any]:
    """Seconds a token of the dense and the sparse decoder, in turn, after prompts of several lengths; bytes of weights read."""
    def choose(layer: int, site: str, width: int) -> Choice | None:
        return Choice(k=round(densities[site] * width)) if site in densities else None

    source, capacity = _source(name), max(PROMPTS) + TOKENS
    decoders = {"dense": Decoder(source, capacity=capacity), "sparse": Decoder(source, choices=choose, capacity=capacity)}
    for decoder in decoders.values():
        decoder.cache.normal_()
    bandwidth = ReadBandwidth()
    found: dict[str, Any] = {"prompts": {}}
    for prompt in PROMPTS:
        def step(turn: int, decoder: Decoder, prompt: int = prompt) -> None:
            decoder.position = prompt
            decoder.step(100 + turn)

        cases = {kind: partial(step, decoder=decoder) for kind, decoder in decoders.items()}
        times = interleaved({**cases, "read": bandwidth}, TOKENS, desc=f"decoding after {prompt}")
        found["prompts"][str(prompt)] = {
            **{kind: times[kind].median for kind in decoders}, "bandwidth": bandwidth.bytes / times["read"].median,
            "ratio": median(a / b for a, b in zip(times["dense"].seconds, times["sparse"].seconds, strict=True)),
            "bytes": {kind: decoder.bytes_read for kind, decoder in decoders.items()},  # of weights and cache
        }
    return found


def against(name: str, sets: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    """Our decoders and everyone else's in the same rounds (see `baselines.measure`)."""
    config = _config(name) if name in SHAPES else None
    return baselines.measure(_source(name), name, PROMPTS, TOKENS, config=config, sets=sets)


def _source(name: str) -> ModelSource:
    if name in REAL:
        model, _ = load_model(name, dtype=torch.bfloat16)
        return ModelSource(model)
    return RandomSource(_config(name))


def _config(name: str):
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[name], rope_theta=500000.0, tie_word_embeddings=True)


def table(name: str, found: dict[str, Any]) -> str:
    """The figures of one model as text: tokens a second, speed-up over our dense, and what the bytes predict."""
    lines = [f"{name}: tokens per second after prompts of {', '.join(map(str, PROMPTS))} tokens"]
    for setting in (name for name in SETTINGS if name in found):
        points = by_length(found[setting]["prompts"]).values()
        rates = "  ".join(f"{1 / p['sparse']:7.1f}" for p in points)
        ratios = ", ".join(f"{p['ratio']:.2f}" for p in points)
        predicted = ", ".join(f"{p['bytes']['dense'] / p['bytes']['sparse']:.2f}" for p in points)
        share = median(p["bytes"]["sparse"] / p["sparse"] / p["bandwidth"] for p in points)
        lines.append(f"  {setting:12} {rates}   {ratios} x dense in the same rounds; bytes predict {predicted}; "
                     f"{100 * share:.0f}% of bandwidth")
    if "baselines" in found:
        lines.append(baselines.table(name, found["baselines"]))
    return "\n".join(lines)
