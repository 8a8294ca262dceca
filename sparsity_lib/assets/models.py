"""Models by name: embedded ones, local folders and hub ids through one call."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from sparsity_lib.assets.build import asset_path
from sparsity_lib.assets.convert import quiet_bars
from sparsity_lib.assets.registry import MODELS
from sparsity_lib.assets.smallnets import SMALL, small_path
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.shards import check_files

#: Every name that `load_model` accepts besides hub ids and local folders.
NAMES = (*MODELS, *SMALL)
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def model_path(name: str) -> Path:
    """Folder (config, safetensors, tokenizer, provenance.json) of the embedded model called `name`.

    Fetched and converted at the first call.
    Raises SparsityError for an unknown name, AssetError where the model cannot be had.
    """
    if name not in MODELS:
        raise unknown("embedded model", name, MODELS)
    return asset_path(name)


def load_model(
    name: str, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu",
    attn_implementation: str | None = None, stream: bool = False,
) -> tuple[Any, Any]:
    """Load a model for inference, and its tokenizer.

    Parameters
    ----------
    name
        An embedded name (see `assets.MODELS`), a small network trained for the book (see `assets.SMALL`), a local folder in
        the Hugging Face format, or a hub id, which goes to transformers with remote code off and safetensors only.
    dtype
        Of the weights, a torch dtype or its name.
    device
        Where they are put.
    attn_implementation
        As transformers names it; by default its own choice.

    stream
        The blocks' weights stay in their safetensors files, and each block is read when its turn comes, so that a model larger
        than memory can be calibrated (`fit`), installed into, evaluated and counted, block by block. Of a hub id the files are
        taken from the cache, or fetched into it.

    Returns
    -------
    (model, tokenizer)
        The model in evaluation mode, no parameter requiring a gradient: a causal language model with its head, any other as
        the class that its configuration names. The tokenizer is None for a model without one (a vision model, say).

    Raises
    ------
    SparsityError
        For a name that is neither known, nor a folder, nor reachable on a hub, and for a bad dtype or device.
    AssetError
        Where a model cannot be fetched, was damaged or, with `stream`, has no whole safetensors files.
    """
    import sparsity_lib.drelu  # noqa: F401 - teaches transformers the architecture

    dtype, device = _dtype(dtype), _device(device)
    if not isinstance(stream, bool):
        raise refuse("stream", stream, "true or false")
    folder = _place(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    if Path(folder).is_dir():
        options["local_files_only"] = True
    try:
        if stream and "local_files_only" not in options:
            folder = _snapshot(str(folder))
        model_class, config = _model_class(str(folder), options)
        if Path(folder).is_dir():
            check_files(folder)
        extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
        if stream:
            from sparsity_lib.streamed import open_folder

            model = open_folder(folder, model_class, config, dtype, device, **extra)
            return model, _tokenizer(name, str(folder), options, required=_is_causal(model_class))
        with quiet_bars():
            model = model_class.from_pretrained(
                str(folder), config=config, dtype=dtype, use_safetensors=True, **extra, **options
            )
    except SparsityError:
        raise
    except Exception as error:  # whatever transformers meets in a configuration or a file of weights that is damaged or hostile
        raise _unreachable(name, error) from error
    tokenizer = _tokenizer(name, str(folder), options, required=_is_causal(model_class))
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of an embedded model, a local folder or a hub id. Raises as `load_model` does."""
    return _tokenizer(name, str(_place(name)), {"trust_remote_code": False}, required=True)


def _place(name: str) -> Path | str:
    """The folder or hub id behind `name`; what cannot be either is refused before the hub is asked, which takes long."""
    if not isinstance(name, str) or not name.strip():
        raise refuse("model", name, f"one of {', '.join(NAMES)}, a local folder or a hub id")
    if name in MODELS:
        return model_path(name)
    if name in SMALL:
        return small_path(name)
    if not Path(name).expanduser().is_dir():
        if name[0] in "/.~" or name.count("/") > 1:
            raise _unreachable(name, FileNotFoundError("there is no such folder"))
        if "/" not in name and difflib.get_close_matches(name, NAMES, n=1):
            raise unknown("model", name, NAMES)
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def _snapshot(name: str) -> Path:
    """The folder of the hub's cache that holds the files of a hub id; raises OSError or ValueError where there is none."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def _is_causal(model_class: Any) -> bool:
    return model_class.__name__ == "AutoModelForCausalLM"


def _tokenizer(name: str, folder: str, options: dict[str, Any], required: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # as above: the tokenizer's files are parsed by others, whose errors have no common base
        if required:
            raise _unreachable(name, error) from error
        return None


def _model_class(folder: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The class to load, and the configuration read on the way.

    AutoModelForCausalLM would also take an encoder such as BERT, and give it a language-model head with random weights:
    so the architecture written in the configuration decides.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, **options)
    names = config.architectures or []
    if any(name.endswith(_CAUSAL) for name in names):
        return transformers.AutoModelForCausalLM, config
    named = getattr(transformers, names[0], None) if names else None
    return named or transformers.AutoModel, config


def _unreachable(name: str, error: Exception) -> SparsityError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SparsityError(
        f"{unknown('model', name, NAMES)} A local folder or a hub id would do as well, but {name!r} could not be "
        f"loaded as one: {reason}"
    )


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise refuse("dtype", dtype, "float32, bfloat16, float16 or float64")
    return chosen


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise refuse("device", device, f"one that works here, such as cpu ({str(error).splitlines()[0]})") from error
    return chosen
