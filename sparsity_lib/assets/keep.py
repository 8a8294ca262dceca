"""Networks trained for the book, kept as small checkpoints whose files are known by their checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity_lib.assets.cache import partial, publish, remove, sha256_of
from sparsity_lib.assets.convert import quiet_bars


def keep_checkpoint(model: nn.Module, tokenizer: Any, folder: Path) -> dict[str, str]:
    """Write a model in bfloat16, and its tokenizer if it has one, whole or not at all; file -> sha256. Casts `model`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial(folder)
    try:
        with quiet_bars():
            model.to(torch.bfloat16).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        publish(temporary, folder)
    finally:
        remove(temporary)
    return checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    """file -> sha256 of what lies in a folder, locks aside."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.suffix != ".lock"}
