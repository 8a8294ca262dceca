"""Table 2 here: decoding with the pair that SCAP compares at equal quality, against the same decoder, dense.

As with all timings, items follow each other in this process, whatever SPARSITY_WORKERS says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sparsity_lib.bench import decode

MODELS = ("smollm2-135m-instruct", "gemma3-270m", "Llama-3.2-1B")
#: The paper's pair: CATS at 50% of the neurons (33% of the FFN), SCAP with 40% of up's and 60% of down's inputs dropped (47%).
SETTINGS = {"cats": {"gate": 0.5}, "scap": {"up_in": 0.6, "down_in": 0.4}}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and setting."""
    data: dict[str, Any] = {}
    for name in MODELS:
        for setting, densities in SETTINGS.items():
            params = {"model": name, "densities": densities, "prompts": decode.PROMPTS, "tokens": decode.TOKENS}
            data.setdefault(name, {})[setting] = checkpoint.item(params, partial(decode.measure, name, densities))
            print(f"{name} {setting} done", flush=True)
    return data, {"settings": SETTINGS, "prompts": decode.PROMPTS, "tokens": decode.TOKENS,
                  "threads": torch.get_num_threads()}, [0]
