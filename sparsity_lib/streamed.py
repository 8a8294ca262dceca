"""Models whose blocks stay on disk: each block's weights are there while it is used, and no longer.

    model, tokenizer = load_model(folder, stream=True)
    plan = fit(recipe, model, tokenizer)          # one block in memory at a time, for all of the text

What is outside of the blocks (embeddings, last norm, head) is there always. Files are mapped into memory: numbers that are
used in the type they are stored in are not even copied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity_lib.errors import AssetError, refuse
from sparsity_lib.shards import FLOATS, Shards
from sparsity_lib.sites import find_sites
from sparsity_lib.stored import STORED, held, refuse_streamed


class Stored:
    """One block's weights on disk, of which a copy is in memory while anyone holds it."""

    def __init__(self, weights: Weights, name: str, block: nn.Module, keys: list[str]) -> None:
        self.weights, self.name, self.block, self.keys = weights, name, block, keys
        self.holders = 0
        self._empty = [(module, key, parameter) for module in block.modules()
                       for key, parameter in module._parameters.items() if parameter is not None]

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holders += 1
        try:
            if self.holders == 1:
                self.weights.fill(self.keys, f"block {self.name}")
                self.block.requires_grad_(False)
                self.weights.blocks_read += 1
            yield
        finally:
            self.holders -= 1
            if self.holders == 0:
                for module, key, parameter in self._empty:
                    module._parameters[key] = parameter


class Weights:
    """Where a model's weights come from, and how they get into it: through transformers' own loading, piece by piece."""

    def __init__(self, model: nn.Module, shards: Shards, dtype: torch.dtype, device: torch.device) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self.model, self.shards, self.device = model, shards, device
        #: How often a block was read from disk.
        self.blocks_read = 0
        self.config = LoadStateDictConfig(
            device_map={"": device}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model))

    def targets(self) -> dict[str, tuple[str, ...]]:
        """Tensor on disk -> parameters and buffers that it fills; those that fill none are left out."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        prefix, own = self.model.base_model_prefix, self.model.state_dict()
        mapping = self.config.weight_mapping
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        found = {}
        for key in self.shards.entries:
            name, pattern = rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, pattern = rename_source_key(key, [], [], prefix, own)
            if name in own:
                made = by_pattern[pattern].target_patterns if pattern else ()
                found[key] = tuple(name.replace(made[0], each) for each in made) or (name,)
        return found

    def check(self, key: str, names: tuple[str, ...]) -> None:
        """Refuse a tensor that is no number of floating point, or not of its one parameter's shape."""
        entry, own = self.shards.entries[key], self.model.get_parameter_or_buffer(names[0])
        if own.is_floating_point() and entry.dtype not in FLOATS:
            raise refuse(f"dtype of {key!r} in {entry.file}", entry.dtype, ", ".join(FLOATS),
                         "store the weights in one of these; quantised checkpoints are not read")
        if names == (key,) and entry.shape != tuple(own.shape):
            raise AssetError(f"{key!r} in {entry.file} is {list(entry.shape)}, and the configuration says {list(own.shape)}. "
                             "Fix: get configuration and weights from one place.")

    def fill(self, keys: list[str], what: str) -> set[str]:
        """Read these tensors into the model; returns the names of all others that it has."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        from sparsity_lib.assets.convert import quiet_bars

        with self.shards.opened(keys) as slices, quiet_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(slices), self.config)
        if info.conversion_errors or info.mismatched_keys:
            wrong = [*info.conversion_errors, *(name for name, *_ in info.mismatched_keys)]
            raise AssetError(f"The weights of {what} do not fit the model: {', '.join(sorted(wrong)[:3])}. "
                             "Fix: get configuration and weights from one place.")
        return info.missing_keys


def open_folder(
    folder: str | Path, model_class: Any, config: Any, dtype: torch.dtype, device: torch.device, **options
) -> nn.Module:
    """A model whose blocks stay in the safetensors files of `folder`; its forward reads each when its turn comes.

    Parameters
    ----------
    model_class, config
        A transformers class, and the configuration read from the folder.
    dtype
        In which weights are used; where they are stored in another, each block is cast when it is read.
    options
        For the class, such as attn_implementation.

    Returns
    -------
    nn.Module
        In eval mode, no parameter requiring a gradient. Its blocks' parameters are on the meta device except while `held`.

    Raises
    ------
    AssetError
        As `Shards` does, or if a weight is missing or has another shape than the configuration says.
    SparsityError
        If the checkpoint is quantised, or has no stack of blocks.
    """
    from accelerate import init_empty_weights

    if getattr(config, "quantization_config", None) is not None:
        raise refuse("quantised checkpoint with stream", True, "weights of floating point", "load_model without stream")
    shards = Shards(folder)
    with init_empty_weights(include_buffers=False):
        build = getattr(model_class, "from_config", None) or model_class._from_config
        model = build(config, dtype=dtype, **options)
    model.eval().requires_grad_(False)
    weights = Weights(model, shards, dtype, device)
    targets = weights.targets()
    for key, names in targets.items():
        weights.check(key, names)
    blocks = {name: [key for key, names in targets.items() if names[0].startswith(f"{name}.")]
              for name in find_sites(model).blocks}
    _refuse_gaps(model, {name for names in targets.values() for name in names}, shards)
    inside = {key for keys in blocks.values() for key in keys}
    missing = weights.fill([key for key in targets if key not in inside], "what is outside of the blocks")
    model.tie_weights(missing_keys={n for n in missing if not _in(n, blocks)}, recompute_mapping=False)
    model.requires_grad_(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    for name, keys in blocks.items():
        block = model.get_submodule(name)
        block.__dict__[STORED] = Stored(weights, name, block, keys)
        block.forward = _reading(block, block.forward)
    model.__dict__[STORED] = weights
    model.save_pretrained = lambda *args, **kwargs: refuse_streamed(model, "save_pretrained")
    return model


def _in(name: str, blocks: dict[str, list[str]]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _refuse_gaps(model: nn.Module, there: set[str], shards: Shards) -> None:
    """Raise AssetError where a parameter has no weights on disk, neither its own nor those that it is tied to."""
    tied = model.all_tied_weights_keys
    tied = {**tied, **{source: target for target, source in tied.items()}}
    gaps = [name for name, _ in model.named_parameters() if name not in there and tied.get(name) not in there]
    if gaps:
        raise AssetError(f"{shards.folder} has no weights for {len(gaps)} of the model's parameters: "
                         f"{', '.join(gaps[:3])}{' ...' if len(gaps) > 3 else ''}. Fix: get all files of the checkpoint.")


def _reading(block: nn.Module, forward):
    """A block's forward that has the block's weights read for as long as it lasts."""

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        with held(block):
            return forward(*args, **kwargs)

    return wrapped
