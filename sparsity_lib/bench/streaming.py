"""Memory and time of calibrating models whose blocks stay on disk, up to sizes that memory does not hold.

Random weights in published shapes are written as bfloat16 shards, one block each, and deleted after use. Each measurement has
a process of its own. Memory is told apart as Linux does: anonymous (the process's own, which must fit) and of files (weights
mapped from their shards, which the system may drop and read again, and the libraries' code). The largest model runs where its
process may not hold more than a quarter of its weights, cached files included.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsity_lib.assets.cache import cache_folder, ensure_room
from sparsity_lib.bench.calibration import in_child
from sparsity_lib.bench.decode import SHAPES
from sparsity_lib.bench.memory_limit import group, join, most
from sparsity_lib.fit import fit_many
from sparsity_lib.methods import claws, teal, wina
from sparsity_lib.plan import Plan
from sparsity_lib.shards import INDEX
from sparsity_lib.streamed import open_folder

#: SmolLM2's, Llama 3.2's and Llama 3.1's shapes, from their published configurations.
SIZES: dict[str, dict[str, Any]] = {
    "0.1B": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1B": {**SHAPES["Llama-3.2-1B"], "tie_word_embeddings": True},
    "3B": {**SHAPES["Llama-3.2-3B"], "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}
#: A threshold alone, one that needs the weights' norms, and a saliency, which needs the loss's gradient.
RECIPES = {
    "teal": partial(teal, 0.5), "wina": partial(wina, 0.5, select="threshold"), "claws": partial(claws, 0.5),
}
#: Models that memory holds several times over are calibrated the ordinary way as well, for comparison.
ALSO_ORDINARY = ("0.1B", "1B")
#: Bytes that the process may hold, where the system lets itself be asked for that.
LIMITS = {"8B": 4 << 30}
TOKENS, LENGTH = 512, 128
#: Seconds between two looks at the memory.
INTERVAL = 0.01
KINDS = {"anonymous": "RssAnon", "files": "RssFile", "resident": "VmRSS"}


def run(checkpoint, sizes: Mapping[str, Mapping[str, Any]] = SIZES) -> tuple[Any, dict, list[int]]:
    """One item a size; a size's files are there while it is measured."""
    settings = {"tokens": TOKENS, "length": LENGTH, "dtype": "bfloat16", "density": 0.5}
    data = {}
    for size, shape in sizes.items():
        params = {"size": size, "shape": dict(shape), "cases": cases(size), "limit": LIMITS.get(size), **settings}
        data[size] = checkpoint.item(params, partial(measure, params))
        print(table({size: data[size]}), flush=True)
    return data, {**settings, "sizes": {k: dict(v) for k, v in sizes.items()}, "threads": torch.get_num_threads()}, [0]


def cases(size: str) -> list[list[str]]:
    """What is measured at a size: [recipe, "streamed" or "ordinary"]."""
    return [[name, how] for name in RECIPES for how in ("streamed", *(["ordinary"] if size in ALSO_ORDINARY else []))]


def measure(params: Mapping[str, Any], place: Path | None = None) -> dict[str, Any]:
    """Write a model, calibrate it in every case, delete it.

    Returns
    -------
    dict
        `bytes` of the weights, `block` of the largest block, `outside` of what is in none; `cases`: "RECIPE HOW" -> what
        `measured` returns; `equal`: recipes of which both ways give the same plan, bit for bit, of those measured both ways.
    """
    config = LlamaConfig(**params["shape"])
    place = place or cache_folder()
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="streaming-", dir=place) as folder:
        sizes = write(config, Path(folder))
        found = {}
        for recipe, how in params["cases"]:
            drop_cache(Path(folder))
            found[f"{recipe} {how}"] = _case({**params, "model": params["size"], "folder": folder, "recipe": recipe, "how": how})
    both = [recipe for recipe, how in params["cases"] if how == "ordinary"]
    equal = [r for r in both if found[f"{r} streamed"]["digest"] == found[f"{r} ordinary"]["digest"]]
    return {**sizes, "cases": found, "both": both, "equal": equal}


def _case(job: Mapping[str, Any]) -> dict[str, Any]:
    """`measured` in a process of its own; `limit` is what it was allowed, and `held` the most that it and the cache took."""
    if job.get("limit") is None:
        return in_child(job, "sparsity_lib.bench.streaming")
    with group(job["limit"]) as place:
        found = in_child({**job, "group": place and str(place)}, "sparsity_lib.bench.streaming")
        return found if place is None else {**found, "limit": job["limit"], "held": most(place)}


def write(config: LlamaConfig, folder: Path, seed: int = 0) -> dict[str, int]:
    """A checkpoint of random weights, block by block: no more than one file's are in memory. Returns the bytes of its parts.

    Raises
    ------
    AssetError
        If the disk lacks room for it.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    size = 2 * sum(map(math.prod, shapes.values()))
    ensure_room(folder, size + (1 << 30))
    config.save_pretrained(folder)
    index, generator = {}, torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    for number, (part, names) in enumerate(_parts(shapes)):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: _random(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        sizes[part] = sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    blocks = [nbytes for part, nbytes in sizes.items() if ".layers." in part]
    return {"bytes": size, "block": max(blocks), "outside": size - sum(blocks)}


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, list[str]]]:
    """Names of parameters that share a file: those of one block, or one that is in none."""
    parts: dict[str, list[str]] = {}
    for name in shapes:
        part = ".".join(name.split(".")[:3]) if ".layers." in name else name
        parts.setdefault(part, []).append(name)
    yield from parts.items()


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms of one, and matrices [out, in] of numbers with deviation in^(-1/2), some of them repeated: that is faster."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    total = math.prod(shape)
    few = torch.randn(min(total, (1 << 22) + 1), generator=generator).mul_(shape[-1] ** -0.5).bfloat16()
    return few.repeat(-(-total // len(few)))[:total].view(shape).clone()  # a clone, as a view would be stored whole


def drop_cache(folder: Path) -> None:
    """Have the system forget what it has cached of a folder's files: the next reader reads the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Peaks:
    """The most memory of each kind while the context lasts, in bytes, looked at every `INTERVAL`; None without Linux."""

    def __init__(self) -> None:
        self.start = self._now()
        self.most = dict(self.start or {})
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.start is not None and not self._done.wait(INTERVAL):
            self.most = {kind: max(self.most[kind], now) for kind, now in self._now().items()}

    @staticmethod
    def _now() -> dict[str, int] | None:
        try:
            rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
            return {kind: 1024 * int(rows[name].split()[0]) for kind, name in KINDS.items()}
        except (OSError, KeyError):
            return None

    def above(self) -> dict[str, int] | None:
        """By kind, the peak less what there was at the beginning."""
        return None if self.start is None else {kind: self.most[kind] - self.start[kind] for kind in self.most}


def measured(params: Mapping[str, Any]) -> dict[str, Any]:
    """What the child does: open the model and fit one recipe.

    Returns
    -------
    dict
        `open` and `seconds` (to open and to fit), `above`: peaks above what the libraries took before, by kind;
        `blocks_read`: how often a block was read (0 ordinarily); `statistics` and `plan` in bytes; `digest` of the plan.
    """
    if params.get("group"):
        join(params["group"])
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(params["folder"])
    ids = torch.randint(config.vocab_size, (params["tokens"] // params["length"], params["length"]))
    with Peaks() as peaks:
        start = time.perf_counter()
        model = _opened(params, config)
        opened = time.perf_counter()
        plan = fit_many([RECIPES[params["recipe"]]()], model, ids=ids)[0]
        seconds = time.perf_counter() - opened
    source = model.__dict__.get("_sparsity_stored")
    return {
        "open": opened - start, "seconds": seconds, "above": peaks.above(),
        "blocks_read": 0 if source is None else source.blocks_read, "statistics": plan.calibration["statistics_bytes"],
        "plan": sum(t.nbytes for t in plan.tensors.values()), "digest": digest(plan),
    }


def _opened(params: Mapping[str, Any], config: LlamaConfig) -> nn.Module:
    dtype = getattr(torch, params["dtype"])
    if params["how"] == "streamed":
        return open_folder(params["folder"], AutoModelForCausalLM, config, dtype, torch.device("cpu"))
    found = AutoModelForCausalLM.from_pretrained(params["folder"], dtype=dtype, local_files_only=True, use_safetensors=True)
    return found.eval().requires_grad_(False)


def digest(plan: Plan) -> str:
    """sha256 of a plan's tensors, by name."""
    found = hashlib.sha256()
    for name in sorted(plan.tensors):
        found.update(name.encode() + plan.tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def table(data: Mapping[str, Any]) -> str:
    """All measurements as text."""
    lines = []
    for size, found in data.items():
        lines.append(f"{size}: {_mib(found['bytes'])} of weights, a block {_mib(found['block'])}, outside of the blocks "
                     f"{_mib(found['outside'])}; the same plan both ways: {len(found['equal'])} of {len(found['both'])}")
        for case, of in found["cases"].items():
            memory = "unknown" if of["above"] is None else ", ".join(f"{kind} {_mib(n)}" for kind, n in of["above"].items())
            bound = f"; allowed {_mib(of['limit'])}" if "limit" in of else ""
            lines.append(f"  {case:15} {of['open']:5.1f} s to open, {of['seconds']:7.1f} s to fit; peak above the libraries' "
                         f"memory: {memory}; {of['blocks_read']} blocks read{bound}")
    return "\n".join(lines)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
