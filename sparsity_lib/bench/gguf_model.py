"""Models as GGUF files, so that llama.cpp decodes the very weights that the other engines decode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from sparsity_lib.assets.cache import cache_folder, ensure_room, guarded, locked, partial, remove
from sparsity_lib.decode.architecture import Architecture
from sparsity_lib.decode.sources import MATRICES, ModelSource
from sparsity_lib.errors import refuse, unknown
from sparsity_lib.progress import track

#: Precisions of the matrices by ggml's names for them; norms are float32 always, as llama.cpp wants them.
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0, "int4": gguf.GGMLQuantizationType.Q4_0,
}
_ARCHITECTURES = {"llama": "llama", "gemma3_text": "gemma3"}
_MATRICES = dict(zip(MATRICES, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True))
_NORMS = {
    "norm_attention": "attn_norm", "norm_after_attention": "post_attention_norm", "norm_ffn": "ffn_norm",
    "norm_after_ffn": "post_ffw_norm", "norm_q": "attn_q_norm", "norm_k": "attn_k_norm",
}
_Named = tuple[str, gguf.GGMLQuantizationType, Callable[[], Tensor]]


def write_gguf(source: ModelSource, path: Path, precision: str = "bfloat16") -> None:
    """Write a Llama or Gemma 3 decoder to the GGUF file `path`, without a vocabulary: tokens are numbers.

    The file becomes visible only when it is complete. int8 is ggml's Q8_0, int4 its Q4_0: a scale for 32 weights each.

    Raises
    ------
    SparsityError
        For an unknown precision, or a model that llama.cpp would compute differently or not at all.
    AssetError
        If the disk has no room, or the folder cannot be written.
    """
    if precision not in TYPES:
        raise unknown("precision", precision, TYPES)
    kind = _kind(source)
    tensors = list(_tensors(source, TYPES[precision], permute=kind == "llama"))
    unfinished = path.with_name(f".{path.name}.unfinished")
    with guarded(path.parent):
        writer = gguf.GGUFWriter(unfinished, kind)
        _describe(writer, source, precision)
        size = 0
        for name, stored, make in tensors:
            shape = tuple(make().shape)
            block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
            if shape[-1] % block:
                raise refuse(f"columns of {name}", shape[-1], f"a multiple of {block}", "choose another precision")
            bytes_ = int(np.prod(shape)) // block * block_bytes
            writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_, raw_dtype=stored)
            size += bytes_
        ensure_room(path.parent, size)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, stored, make in track(tensors, desc=f"writing {path.name}", unit="tensor"):
                writer.write_tensor_data(encode(make(), stored))
            writer.close()
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def temporary_gguf(source: ModelSource, name: str, precision: str = "bfloat16") -> Iterator[Path]:
    """A GGUF file in the cache folder that is gone afterwards; what a dead run left of it goes as well."""
    place = cache_folder() / "bench" / f"{name}.{precision}"
    with locked(place), guarded(place.parent):
        folder = partial(place)
        folder.mkdir()
        try:
            write_gguf(source, folder / "model.gguf", precision)
            yield folder / "model.gguf"
        finally:
            remove(folder)


def encode(weight: Tensor, stored: gguf.GGMLQuantizationType) -> np.ndarray:
    """The bytes of a weight in one of ggml's formats, by rows."""
    if stored == gguf.GGMLQuantizationType.BF16:
        return weight.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    plain = weight.detach().float().contiguous().numpy()
    return plain if stored == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(plain, stored)


def _kind(source: ModelSource) -> str:
    config = source.model.config.get_text_config()
    if config.model_type not in _ARCHITECTURES:
        raise refuse("model type", config.model_type, f"one of {', '.join(_ARCHITECTURES)}")
    if any(source.bias(0, name) is not None for name in MATRICES):
        raise refuse("biases of the projections", "some", "none")
    for parameters in _rotations(source).values():
        if parameters.get("rope_type", "default") != "default":
            raise refuse("rotation", parameters["rope_type"], "default")
    return _ARCHITECTURES[config.model_type]


def _rotations(source: ModelSource) -> dict[str, dict]:
    """Parameters of the rotation by kind of layer."""
    parameters = source.model.config.get_text_config().rope_parameters
    return parameters if "full_attention" in parameters else {"full_attention": parameters}


def _describe(writer: gguf.GGUFWriter, source: ModelSource, precision: str) -> None:
    a: Architecture = source.architecture
    kind = TYPES[precision].name
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_vocab_size(a.vocabulary)
    writer.add_context_length(source.model.config.get_text_config().max_position_embeddings)
    writer.add_embedding_length(a.hidden)
    writer.add_block_count(a.layers)
    writer.add_feed_forward_length(a.neurons)
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(a.eps)
    writer.add_rope_dimension_count(a.head_dim)
    rotations = _rotations(source)
    writer.add_rope_freq_base(rotations["full_attention"]["rope_theta"])
    if "sliding_attention" in rotations:
        writer.add_rope_freq_base_swa(rotations["sliding_attention"]["rope_theta"])
    if any(a.windows):
        writer.add_sliding_window(max(a.windows))
        writer.add_sliding_window_pattern([window > 0 for window in a.windows])
    writer.add_tokenizer_model("no_vocab")


def _tensors(source: ModelSource, stored: gguf.GGMLQuantizationType, permute: bool) -> Iterator[_Named]:
    """Names, formats and makers of all tensors: a maker is called when the tensor is needed, and its outcome forgotten."""
    full = gguf.GGMLQuantizationType.F32
    yield "token_embd.weight", stored, source.embedding
    if source.head() is not None:
        yield "output.weight", stored, source.head
    yield "output_norm.weight", full, source.final_norm
    a = source.architecture
    for layer in range(a.layers):
        for name, norm in source.norms(layer).items():
            if norm is not None:
                yield f"blk.{layer}.{_NORMS[name]}.weight", full, lambda norm=norm: norm
        for name, place in _MATRICES.items():
            heads = {"q": a.heads, "k": a.kv_heads}.get(name, 0) if permute else 0
            yield f"blk.{layer}.{place}.weight", stored, lambda i=layer, n=name, h=heads: _permuted(source.matrix(i, n), h)


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys in the order of llama.cpp's Llama, which rotates neighbours, not halves, of a head."""
    if not heads:
        return weight
    rows, cols = weight.shape
    return weight.view(heads, 2, rows // heads // 2, cols).transpose(1, 2).reshape(rows, cols)
