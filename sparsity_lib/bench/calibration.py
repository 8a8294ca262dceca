"""Seconds and memory of calibration: against the length of its text, and against the size of the model.

Each measurement has a process of its own, as a process's peak is a peak only once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib.assets.models import load_model
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.bench.decode import SHAPES
from sparsity_lib.errors import SparsityError
from sparsity_lib.fit import fit
from sparsity_lib.methods import METHODS

CHOSEN = ("cats", "claws", "larosa")
DENSITY, LENGTH = 0.5, 512
#: Tokens of text by embedded model; Gemma's head of 262,144 entries makes CLAWS slow on long ones.
TOKENS = {"smollm2-135m-instruct": (2048, 8192, 32768), "gemma3-270m": (2048, 8192)}
#: Random weights in published shapes, and tokens of text, for what size alone does.
SIZE_TOKENS = 2048
SIZES = {
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5, "vocab_size": 49152},
    "1B": SHAPES["Llama-3.2-1B"],
}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, method and number of tokens."""
    data: dict[str, Any] = {"text": {}, "size": {}}
    settings = {"density": DENSITY, "length": LENGTH, "dtype": "bfloat16"}
    wanted = [("text", name, None, lengths) for name, lengths in TOKENS.items()]
    wanted += [("size", name, shape, (SIZE_TOKENS,)) for name, shape in SIZES.items()]
    for kind, name, shape, lengths in wanted:
        for method in CHOSEN:
            for tokens in lengths:
                params = {"model": name, "shape": shape, "method": method, "tokens": tokens, **settings}
                found = checkpoint.item(params, partial(in_child, params))
                data[kind].setdefault(name, {}).setdefault(method, {})[str(tokens)] = found
                print(line(name, method, found), flush=True)
    shapes = {"sizes": SIZES, "size_tokens": SIZE_TOKENS}
    return data, {**settings, "tokens": TOKENS, **shapes, "threads": torch.get_num_threads()}, [0]


def in_child(params: Mapping[str, Any], module: str = "sparsity_lib.bench.calibration") -> dict[str, Any]:
    """`measure` of a model by name, or of random weights in a shape, in a process of its own; or what `module` does.

    Raises
    ------
    SparsityError
        If that process fails, with its last line.
    """
    command = [sys.executable, "-m", module, json.dumps(dict(params))]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise SparsityError(f"The measurement of {params['model']} ended with {child.returncode}: {last}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def measured(params: Mapping[str, Any]) -> dict[str, Any]:
    """What the child does: make the model and the text, then measure."""
    dtype = getattr(torch, params["dtype"])
    if params["shape"] is None:
        model, tokenizer = load_model(params["model"], dtype=dtype)
        ids = token_sequences(tokenizer, "calibration", tokens=params["tokens"], length=params["length"], seed=0)
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(**params["shape"], tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        ids = torch.randint(config.vocab_size, (params["tokens"] // params["length"], params["length"]))
    return measure(model, ids, params["method"], params["density"])


def measure(model: nn.Module, ids: Tensor, method: str, density: float) -> dict[str, Any]:
    """Fit one method.

    Returns
    -------
    dict
        `seconds`; `passes` over the text; `peak`: the most resident memory above that of the loaded model;
        `statistics`: what the statistics themselves held; `model`: its weights; all in bytes, and `peak` None where
        the system cannot tell.
    """
    with torch.inference_mode():
        model(ids[:1, :8])  # weights are mapped from disk: they are resident once they have been read
    seen = 0

    def count(module: nn.Module, args: tuple, out: Tensor) -> None:
        nonlocal seen
        if out.shape[1] == ids.shape[1]:  # not a check of the model on a few tokens
            seen += out.shape[:-1].numel()

    handle = model.get_input_embeddings().register_forward_hook(count)
    before = _start_peak()
    start = time.perf_counter()
    plan = fit(METHODS[method](density), model, ids=ids)
    seconds = time.perf_counter() - start
    peak = None if before is None else _resident("VmHWM") - before
    handle.remove()
    return {
        "tokens": ids.numel(), "seconds": seconds, "passes": seen / ids.numel(), "peak": peak,
        "statistics": plan.calibration["statistics_bytes"], "plan": sum(t.nbytes for t in plan.tensors.values()),
        "model": sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values()),
    }


def _start_peak() -> int | None:
    """Bytes resident now, from which the peak is counted anew; None where Linux does not allow that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    (found,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{name}:"))
    return 1024 * int(found.split()[1])


def line(name: str, method: str, found: Mapping[str, Any]) -> str:
    """One measurement as text."""
    peak = "  peak unknown" if found["peak"] is None else f"{found['peak'] / 2**20:8.0f} MiB"
    return (
        f"{name:22} {method:7} {found['tokens']:6} tokens in {found['passes']:.0f} pass: {found['seconds']:7.1f} s, "
        f"{found['tokens'] / found['seconds']:6.0f} tokens/s; above the model's {found['model'] / 2**20:5.0f} MiB {peak}, "
        f"of it statistics {found['statistics'] / 2**20:7.1f} MiB and the plan {found['plan'] / 2**20:6.1f} MiB"
    )


def table(data: Mapping[str, Any]) -> str:
    """All measurements as text."""
    return "\n".join(
        line(name, method, found)
        for kind in ("text", "size") for name, methods in data[kind].items()
        for method, lengths in methods.items() for found in lengths.values()
    )


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
