"""Headers of files of weights, harmed where they are parsed: what a file holds, where, and of which type and shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from sparsity_lib.errors import AssetError
from sparsity_lib.stress import harm, tiny
from sparsity_lib.stress.base import Attempts, trial

_INDEX = "model.safetensors.index.json"


@trial("inputs", "safetensors files and indices of shards whose headers were harmed: lengths, names, types, shapes and places",
       "a clear error, or a model of the shape that config.json says (its numbers have no checksum in that format)")
def safetensors_headers(t: Attempts) -> None:
    from sparsity_lib.assets import load_model

    model, folder = tiny.model(), t.folder / "model"
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    files = {path.name: path.read_bytes() for path in [*folder.glob("*.safetensors"), folder / _INDEX]}
    assert len(files) > 3

    def opened(stream: bool) -> Callable[[], object]:
        return lambda: load_model(str(folder), stream=stream)[0]

    def holds(found) -> bool:
        return {name: p.shape for name, p in found.named_parameters()} == shapes and bool(found(tiny.tokens()).logits.shape)

    for stream in (False, True):
        t.attempt(f"whole files, stream={stream}", opened(stream), holds)
    for i in t.rounds(12, 600):
        name = t.random.choice(sorted(files))
        broken = harm.text(json.loads(files[name]), t.random).encode() if name == _INDEX else _header(files[name], t)
        (folder / name).write_bytes(broken)
        for stream in (False, True):
            t.attempt(f"header {i} of {name}, stream={stream}", opened(stream), holds)
        (folder / name).write_bytes(files[name])


def _header(whole: bytes, t: Attempts) -> bytes:
    """A safetensors file with another header: 8 bytes of its length, then JSON."""
    size = int.from_bytes(whole[:8], "little")
    text, body = whole[8 : 8 + size], whole[8 + size :]
    kind = t.random.random()
    if kind < 0.2:  # a length that is not that of the header
        wrong = t.random.choice([0, 1, size - 1, size + 1, len(whole), 2**31, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + text + body
    broken = harm.text(json.loads(text), t.random).encode("utf-8", "replace") if kind < 0.8 else harm.bytes_(text, t.random)
    return len(broken).to_bytes(8, "little") + broken + body


@trial("inputs", "GGUF files whose headers were harmed, read past the checksum that would have refused them",
       "a clear error, or a model that runs")
def gguf_headers(t: Attempts) -> None:
    from sparsity_lib.assets.convert import convert_gguf
    from sparsity_lib.assets.registry import Asset

    whole, header = _gguf(t.folder / "whole.gguf")
    asset = Asset("tiny", "gguf", (), ("*",), "", 1, "tiny")
    path, target = t.folder / "tiny.gguf", t.folder / "converted"

    def converted() -> Path:
        shutil.rmtree(target, ignore_errors=True)
        convert_gguf(path, asset, target)
        return target

    path.write_bytes(whole)
    t.attempt("the whole file", converted, runs)
    for i in t.rounds(4, 150):
        broken = harm.bytes_(whole[:header], t.random) + whole[header:]
        path.write_bytes(broken)
        t.attempt(f"GGUF header {i}", converted, runs, refusal=AssetError)


def runs(folder: Path) -> bool:
    """Whether the folder holds a model that gives logits."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)(tiny.tokens() % 8).logits.dim() == 3


def _gguf(path: Path) -> tuple[bytes, int]:
    """A GGUF file of a tiny Llama, and how long its header is."""
    import gguf
    import numpy as np

    model = tiny.model(layers=1)
    config, words = model.config, [f"<{i}>" for i in range(tiny.VOCABULARY)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(found, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    return whole, min(len(whole), int(gguf.GGUFReader(path).tensors[0].data_offset))
