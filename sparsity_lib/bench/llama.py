"""llama.cpp as a baseline: the extra `bench` brings it, and whoever lacks it measures without it."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sparsity_lib.bench.gguf_model import temporary_gguf
from sparsity_lib.checks import count
from sparsity_lib.decode.sources import ModelSource
from sparsity_lib.errors import SparsityError, refuse

_silent: list[object] = []  # the logger that llama.cpp calls, which must outlive it


def available() -> bool:
    """Whether llama.cpp can be measured here."""
    try:
        load()
    except SparsityError:
        return False
    return True


def load() -> ModuleType:
    """llama-cpp-python's module.

    torch is loaded before it (see the imports above), so llama.cpp finds OpenMP in memory and takes torch's: one pool of
    threads for all engines. A pool of its own would go on spinning for milliseconds into the next engine's time.

    Raises
    ------
    SparsityError
        If it is not installed, or its library does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise SparsityError(
            f"llama.cpp is not there to be measured ({error}). Fix: pip install '.[bench]', which compiles it."
        ) from error
    if not _silent:
        _silent.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
        llama_cpp.llama_log_set(_silent[0], ctypes.c_void_p())
    return llama_cpp


def version() -> str | None:
    """Version of llama-cpp-python, None without it."""
    return load().__version__ if available() else None


class LlamaCpp:
    """A GGUF file in llama.cpp, decoding one sequence on torch's number of threads.

    Weights are read into memory of its own, not mapped from the file. The cache is float16 (llama.cpp's default), and a
    sliding layer's holds little more than its window.

    Parameters
    ----------
    path
        The GGUF file; it is not needed after loading.
    capacity
        Tokens that the cache holds.

    Raises
    ------
    SparsityError
        If llama.cpp is missing, or cannot load the file.
    """

    def __init__(self, path: Path, capacity: int = 2048) -> None:
        self._native = native = load()
        held: list[tuple[str, object]] = []
        self._free = weakref.finalize(self, _free, native, held)
        self.capacity, self.position = count("capacity", capacity), 0
        native.llama_backend_init()
        options = native.llama_model_default_params()
        options.n_gpu_layers = 0
        if hasattr(options, "load_mode"):
            options.load_mode = native.LLAMA_LOAD_MODE_NONE
        else:  # versions before the modes
            options.use_mmap = False
        model = native.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise SparsityError(f"llama.cpp cannot load {path.name}. Fix: is the file whole, and llama-cpp-python recent?")
        held.append(("llama_model_free", model))
        options = native.llama_context_default_params()
        options.n_ctx = self.capacity
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.swa_full, options.no_perf = False, True
        self._context = native.llama_init_from_model(model, options)
        if not self._context:
            raise SparsityError(f"llama.cpp cannot start with a cache of {capacity} tokens. Fix: choose a smaller capacity.")
        held.append(("llama_free", self._context))
        self._memory = native.llama_get_memory(self._context)
        self.vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))

    @staticmethod
    def of(source: ModelSource, name: str, precision: str = "bfloat16", capacity: int = 2048) -> LlamaCpp:
        """The weights of `source`, handed over through a temporary file."""
        load()  # before the file is written in vain
        with temporary_gguf(source, name, precision) as path:
            return LlamaCpp(path, capacity)

    def read(self, tokens: list[int]) -> Tensor:
        """Append tokens; logits [vocabulary] (float32, llama.cpp's memory) after the last of them."""
        if not tokens or self.position + len(tokens) > self.capacity:
            raise refuse("tokens", len(tokens), f"1 to {self.capacity - self.position}, which the cache has room for")
        step = 512
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            array = (self._native.llama_token * len(part))(*part)  # the batch points into it
            if self._native.llama_decode(self._context, self._native.llama_batch_get_one(array, len(part))):
                raise SparsityError("llama.cpp failed to decode.")
        self.position += len(tokens)
        logits = self._native.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocabulary,)))

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        if position < self.position:
            if not self._native.llama_memory_seq_rm(self._memory, 0, position, -1):
                raise SparsityError(f"llama.cpp cannot go back to token {position}.")
            self.position = position

    def close(self) -> None:
        """Free its memory; without this call it goes with the object."""
        self._free()


def _free(native: ModuleType, held: list[tuple[str, object]]) -> None:
    for name, what in reversed(held):
        getattr(native, name)(what)
