"""A model, tokens and recipes that take milliseconds: small enough to be killed a thousand times."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib.methods import METHODS
from sparsity_lib.recipe import Recipe

VOCABULARY, WIDTH = 61, 48


def model(seed: int = 0, layers: int = 2) -> nn.Module:
    """A Llama with random weights, equal for equal arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"], pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return LlamaForCausalLM(config).eval()


def tokenizer() -> Any:
    """Words are numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="0")


def tokens(sequences: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids [sequences, length]."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


@cache
def recipes() -> tuple[Recipe, ...]:
    """One recipe of each method of the book, at half the density."""
    return tuple(make(0.5) for make in METHODS.values())


def checkout(folder: Path) -> Path:
    """An empty checkout of the book: the folders and files by which it is known."""
    for name in ("notebooks", "results", "sparsity_lib"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("_toc.yml", "pyproject.toml"):
        if not (folder / name).exists():
            (folder / name).touch()
    return folder


def book(folder: Path) -> Path:
    """A checkout with one chapter, `demo`, and its parameter `share`."""
    import nbformat

    from sparsity_lib import project

    path = checkout(folder) / "notebooks" / "demo.ipynb"
    if not path.exists():
        new = nbformat.v4
        cells = [new.new_code_cell("share: float = 0.5  # (0, 1] of it", metadata={"tags": ["parameters"]}, id="a")]
        cells += [new.new_code_cell(f"share * {i}  # {'x' * 2000}", id=f"b{i}") for i in range(4)]
        project.write_atomic(path, nbformat.writes(new.new_notebook(cells=cells)))
    return folder


def run_cells(pause: float = 0.0) -> None:
    """Let papermill run a chapter's cells in this process: each takes a while, puts out its own text and records its length.

    What is written, when and by whom, stays as it is. A kernel would take seconds to start, and is no part of what is tried.
    """
    import time

    from nbformat.v4 import new_output
    from papermill.engines import Engine, papermill_engines

    from sparsity_lib.records import Records

    class Here(Engine):
        @classmethod
        def execute_managed_notebook(cls, manager: Any, kernel_name: str, **options: Any) -> None:
            records = Records("demo")
            for number, cell in enumerate(manager.nb.cells):
                manager.cell_start(cell, number)
                time.sleep(pause)
                cell.outputs = [new_output("stream", text=cell.source)]
                records.add(f"length {number}", len(cell.source))
                manager.cell_complete(cell, number)

    papermill_engines.register(None, Here)


def grid(checkpoint: Any, numbers: int = 6, pause: float = 0.0) -> tuple[list[Any], dict[str, Any], list[int]]:
    """An experiment of `results`: a few items, each of which takes a while if asked to."""
    import time

    def item(n: int) -> dict[str, Any]:
        time.sleep(pause)
        values = torch.randn(200, generator=torch.Generator().manual_seed(n))
        return {"n": n, "mean": float(values.mean()), "values": values.tolist()}

    data = [checkpoint.item({"n": n}, lambda n=n: item(n)) for n in range(numbers)]
    return data, {"numbers": numbers}, [0]
