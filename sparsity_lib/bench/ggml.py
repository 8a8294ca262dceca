"""ggml's matrix-vector products, called through the library that llama-cpp-python ships: what llama.cpp does with a weight."""

from __future__ import annotations

import ctypes
import sys
import weakref
from functools import cache
from pathlib import Path

import gguf
import torch
from torch import Tensor

from sparsity_lib.bench import llama
from sparsity_lib.bench.gguf_model import TYPES
from sparsity_lib.errors import SparsityError, refuse, unknown

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {  # by library: result, then arguments
    "ggml-base": {
        "ggml_new_tensor_2d": (_P, _P, _I, _L, _L), "ggml_mul_mat": (_P, _P, _P, _P), "ggml_new_graph": (_P, _P),
        "ggml_build_forward_expand": (None, _P, _P), "ggml_free": (None, _P), "ggml_nbytes": (ctypes.c_size_t, _P),
        "ggml_tensor_overhead": (ctypes.c_size_t,), "ggml_graph_overhead": (ctypes.c_size_t,),
        "ggml_quantize_chunk": (ctypes.c_size_t, _I, _P, _P, _L, _L, _L, _P),
        "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P), "ggml_backend_buffer_free": (None, _P),
        "ggml_backend_tensor_set": (None, _P, _P, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_tensor_get": (None, _P, _P, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_graph_compute": (_I, _P, _P), "ggml_backend_free": (None, _P),
        "ggml_backend_dev_buffer_type": (_P, _P), "ggml_backend_dev_supports_op": (ctypes.c_bool, _P, _P),
        "ggml_backend_get_device": (_P, _P), "ggml_backend_buft_name": (ctypes.c_char_p, _P),
        "ggml_backend_reg_get_proc_address": (_P, _P, ctypes.c_char_p), "ggml_backend_dev_backend_reg": (_P, _P),
    },
    "ggml-cpu": {"ggml_backend_cpu_init": (_P,), "ggml_backend_cpu_set_n_threads": (None, _P, _I)},
}


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("size", ctypes.c_size_t), ("buffer", _P), ("no_alloc", ctypes.c_bool)]


class _Library:
    """The functions of _SIGNATURES as attributes."""

    def __init__(self) -> None:
        folder = Path(llama.load().__file__).parent / "lib"
        for name, functions in _SIGNATURES.items():
            library = ctypes.CDLL(str(_file(folder, name)))
            for function, (result, *arguments) in functions.items():
                found = getattr(library, function)
                found.restype, found.argtypes = result, arguments
                setattr(self, function, found)
            if name == "ggml-base":
                library.ggml_init.restype, library.ggml_init.argtypes = _P, [_Parameters]
                self.ggml_init = library.ggml_init


def _file(folder: Path, name: str) -> Path:
    pattern = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(sys.platform, f"lib{name}.so")
    if not (folder / pattern).exists():
        raise SparsityError(f"llama-cpp-python comes without {pattern}, so its products cannot be measured alone.")
    return folder / pattern


@cache
def _load() -> _Library:
    return _Library()


def available() -> bool:
    """Whether ggml can be measured here."""
    try:
        _load()
    except (SparsityError, OSError, AttributeError):
        return False
    return True


class Product:
    """A weight in one of ggml's formats, laid out as llama.cpp lays it out on this processor, and its product with a vector.

        product = Product(weight, "int4", x)
        y = product()                       # on torch's number of threads

    Parameters
    ----------
    weight
        [out, in], float32.
    format
        One of "float32", "bfloat16", "int8" (Q8_0), "int4" (Q4_0).
    x
        The vector [in] or [1, in]; ggml takes it as float32 and rounds it to what the format multiplies with.

    Raises
    ------
    SparsityError
        If llama.cpp is missing, or the format or a shape is none of ggml's.
    """

    def __init__(self, weight: Tensor, format: str, x: Tensor) -> None:
        if format not in TYPES:
            raise unknown("format", format, TYPES)
        block, _ = gguf.GGML_QUANT_SIZES[TYPES[format]]
        if weight.dim() != 2 or weight.shape[1] % block:
            raise refuse("shape of the weight", tuple(weight.shape), f"[out, in], in a multiple of {block}")
        if x.numel() != weight.shape[1]:
            raise refuse("shape of x", tuple(x.shape), f"[{weight.shape[1]}]")
        self._ggml, self._held = _load(), []
        self._free = weakref.finalize(self, _free, self._ggml, self._held)
        self._backend = self._hold("ggml_backend_free", self._ggml.ggml_backend_cpu_init())
        self._ggml.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        #: How the weight lies in memory, by ggml's name for it.
        self.layout = self._build(weight.shape, TYPES[format])
        self._put(self._weight, _encode(self._ggml, weight, TYPES[format]))
        self._put(self._x, x.detach().float().flatten().contiguous())
        self._y = torch.empty(len(weight))

    def __call__(self) -> Tensor:
        """The product [out], float32, overwritten by the next call."""
        if self._ggml.ggml_backend_graph_compute(self._backend, self._graph):
            raise SparsityError("ggml failed to multiply.")
        self._ggml.ggml_backend_tensor_get(self._product, self._y.data_ptr(), 0, self._y.nbytes)
        return self._y

    def _build(self, shape: tuple[int, int], stored: int) -> str:
        """Make the graph with the first layout that multiplies, in llama.cpp's order: its special ones, then plain rows."""
        ggml = self._ggml
        device = ggml.ggml_backend_get_device(self._backend)
        plain = ggml.ggml_backend_dev_buffer_type(device)
        size = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        for layout in (*_special_layouts(ggml, device), plain):
            kept = len(self._held)
            weights, rest = (self._hold("ggml_free", ggml.ggml_init(_Parameters(size, None, True))) for _ in range(2))
            self._weight = ggml.ggml_new_tensor_2d(weights, int(stored), shape[1], shape[0])
            self._x = ggml.ggml_new_tensor_2d(rest, int(gguf.GGMLQuantizationType.F32), shape[1], 1)
            self._product, self._graph = ggml.ggml_mul_mat(rest, self._weight, self._x), ggml.ggml_new_graph(rest)
            ggml.ggml_build_forward_expand(self._graph, self._product)
            self._hold("ggml_backend_buffer_free", ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, layout))
            self._hold("ggml_backend_buffer_free", ggml.ggml_backend_alloc_ctx_tensors_from_buft(rest, plain))
            if ggml.ggml_backend_dev_supports_op(device, self._product):
                return ggml.ggml_backend_buft_name(layout).decode()
            _free(ggml, self._held, kept)
        raise SparsityError("ggml does not multiply with this format here.")

    def _hold(self, freed_by: str, what: int | None) -> int:
        if not what:
            raise SparsityError("ggml found no memory.")
        self._held.append((freed_by, what))
        return what

    def _put(self, where: int, values: Tensor) -> None:
        if values.nbytes != self._ggml.ggml_nbytes(where):
            raise SparsityError("ggml stores this format otherwise than expected.")
        self._ggml.ggml_backend_tensor_set(where, values.data_ptr(), 0, values.nbytes)


def _free(ggml: _Library, held: list[tuple[str, int]], kept: int = 0) -> None:
    while len(held) > kept:
        how, what = held.pop()
        getattr(ggml, how)(what)


def _special_layouts(ggml: _Library, device: int) -> list[int]:
    """Layouts for which this processor has faster products than for plain rows."""
    name = b"ggml_backend_dev_get_extra_bufts"
    address = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_dev_backend_reg(device), name)
    if not address:
        return []
    found, i = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device), 0
    layouts = []
    while found and found[i]:
        layouts.append(found[i])
        i += 1
    return layouts


def _encode(ggml: _Library, weight: Tensor, stored: gguf.GGMLQuantizationType) -> Tensor:
    """The bytes of the weight, by ggml's own rounding."""
    plain = weight.detach().float().contiguous()
    if stored == gguf.GGMLQuantizationType.F32:
        return plain
    if stored == gguf.GGMLQuantizationType.BF16:
        return plain.to(torch.bfloat16)
    block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
    found = torch.empty(plain.numel() // block * block_bytes, dtype=torch.uint8)
    ggml.ggml_quantize_chunk(int(stored), plain.data_ptr(), found.data_ptr(), 0, *plain.shape, None)
    return found
