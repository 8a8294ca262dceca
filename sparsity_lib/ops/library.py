"""The compiled operators: finding the library, one thread pool with torch, and the structures that cross the border."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.ops.packed import FORMATS, Packed

#: Environment variable that holds an instruction set to use instead of the processor's best, or "off".
SWITCH = "SPARSITY_ISA"
ISAS = ("avx512vnni", "avx512", "avx2", "baseline")
#: Dtypes of vectors that the library knows, with its numbers.
FLOATS = {torch.float32: 0, torch.bfloat16: 1}
_STATUS = {1: "refused its arguments", 2: "found no memory for its buffers"}


class Weight(ctypes.Structure):
    """types.h: Weight."""

    _fields_ = [("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
                ("padded", ctypes.c_int64), ("stride", ctypes.c_int64), ("format", ctypes.c_int32), ("group", ctypes.c_int32),
                ("rounded", ctypes.c_int64)]


class Select(ctypes.Structure):
    """types.h: Select."""

    _fields_ = [("shift", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("threshold_each", ctypes.c_void_p),
                ("threshold", ctypes.c_float), ("by_rank", ctypes.c_int32), ("k", ctypes.c_int64), ("group", ctypes.c_int32),
                ("repair", ctypes.c_int32), ("law", ctypes.c_int32), ("with_sign", ctypes.c_int32)]


class Vectors(ctypes.Structure):
    """types.h: Vectors."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("format", ctypes.c_int32), ("batch", ctypes.c_int32)]


class Stripe(ctypes.Structure):
    """types.h: Stripe."""

    _fields_ = [("weight", Weight), ("select", Select), ("first", ctypes.c_int64)]


def path() -> Path | None:
    """The compiled library, or None where the install could not build it."""
    folder = Path(__file__).parent
    return next((p for suffix in EXTENSION_SUFFIXES if (p := folder / f"_cpu{suffix}").exists()), None)


@cache
def load() -> ctypes.CDLL | None:
    """The library, started; None (with one warning) where there is none, and the reference has to do.

    Raises
    ------
    SparsityError
        If the environment asks for an instruction set that is unknown or that this processor lacks.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted and wanted not in (*ISAS, "off"):
        raise unknown(SWITCH, wanted, (*ISAS, "off"))
    found = path()
    if found is None or wanted == "off":
        if wanted != "off":
            fix = "Fix: install a C++ compiler and run pip install again."
            warnings.warn(f"The compiled CPU operators are missing, plain PyTorch does their work, slowly. {fix}", stacklevel=3)
        return None
    library = ctypes.CDLL(str(found))
    sizes = (ctypes.c_int64 * 5)()
    library.sparsity_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(each) for each in (Weight, Select, Vectors, ctypes.c_void_p, Stripe)]:
        raise SparsityError(f"{found.name} was built from other sources. Fix: pip install the package again.")
    library.sparsity_start.argtypes = (ctypes.c_char_p, *[ctypes.c_void_p] * 3)
    if library.sparsity_start(wanted.encode() or None, *_thread_pool()):
        raise SparsityError(f"{SWITCH} = {wanted!r}: this processor lacks it. Fix: unset it, or name another.")
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.sparsity_input_sparse.argtypes = (*[pointer] * 5, integer, pointer, ctypes.c_int)
    library.sparsity_striped.argtypes = (pointer, long, long, *[pointer] * 3, integer, pointer, ctypes.c_int)
    library.sparsity_dense.argtypes = (pointer, pointer, pointer, pointer, ctypes.c_int)
    library.sparsity_glu.argtypes = (*[pointer] * 8, integer, integer, pointer, pointer, pointer, ctypes.c_int)
    library.sparsity_nm_select.argtypes = (pointer, long, pointer, pointer, integer, pointer, ctypes.c_int)
    library.sparsity_isa.restype = ctypes.c_char_p
    library.sparsity_read.restype = ctypes.c_double
    return library


def _thread_pool() -> tuple[int | None, int | None, int | None]:
    """GOMP_parallel and its companions in the OpenMP runtime that torch has loaded: one pool for both."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    home = Path(torch.__file__).parent
    names_of_runtimes = ("lib/libgomp*", "lib/libiomp*", "lib/libomp*", "../torch.libs/libgomp*", "../torch.libs/libomp*")
    bundled = [path for pattern in names_of_runtimes for path in sorted(home.glob(pattern))]
    for candidate in (None, *map(str, bundled)):
        try:
            runtime = ctypes.CDLL(candidate)
            return tuple(ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names)
        except (OSError, AttributeError):
            continue
    return None, None, None


def check(status: int, what: str) -> None:
    """Raise SparsityError for a status other than 0."""
    if status:
        raise SparsityError(f"The compiled operator {what} {_STATUS.get(status, 'failed')}.")


def weight_of(packed: Packed) -> Weight:
    """The structure for a packed weight, which must outlive it; made once for each.

    Raises
    ------
    SparsityError
        For a format that C++ does not know.
    """
    known = packed.__dict__.get("_structure")
    if known is not None:
        return known
    scales = None if packed.scales is None else packed.scales.data_ptr()
    number = FORMATS[packed.format][0]
    if number is None:
        formats = ", ".join(name for name, (each, *_) in FORMATS.items() if each is not None)
        raise refuse("format", packed.format, f"one that the compiled library knows: {formats}")
    found = Weight(packed.data.data_ptr(), scales, packed.rows, packed.cols, packed.padded, packed.stride, number, packed.group)
    packed.__dict__["_structure"] = found  # the dataclass is frozen, its tensors stay where they are
    return found


def stripes_of(packed: Packed, thresholds: Tensor, shift: Tensor | None, scale: Tensor | None, rounded: bool) -> ctypes.Array:
    """The structures of a weight packed in stripes; thresholds [stripes, in] float32. All tensors must outlive it.

    rounded: whether x is bfloat16. Made once for the same memory.
    """
    key = (thresholds.data_ptr(), address(shift), address(scale), rounded)
    known = packed.__dict__.get("_stripes", (None, None))
    if known[0] == key:
        return known[1]
    whole, found = weight_of(packed), (Stripe * packed.stripes)()
    (_, line, bits), step = FORMATS[packed.format], packed.rows * packed.padded
    for i, each in enumerate(found):
        first = i * packed.stripe
        scales = whole.scales
        if scales is not None:  # of int8 one an output, of int4 bfloat16 along the rows
            scales += 4 * first if packed.format == "int8" else 2 * i * step // packed.group
        outputs = min(packed.stripe, packed.cols - first)
        padded = packed.padded if packed.format == "int4" else -(-outputs // line) * line  # int4's scales lie `padded` apart
        each.weight = Weight(whole.data + i * step * bits // 8, scales, packed.rows, outputs, padded, packed.padded, whole.format,
                             packed.group, int(rounded))
        each.select = Select(address(shift), address(scale), thresholds.data_ptr() + 4 * i * packed.rows)
        each.first = first
    packed.__dict__["_stripes"] = (key, found)
    return found


def vectors_of(x: Tensor) -> Vectors:
    """The structure for a batch [tokens, width] whose last axis is contiguous."""
    return Vectors(x.data_ptr(), x.stride(0), FLOATS[x.dtype], len(x))


def address(tensor: Tensor | None) -> int | None:
    """A tensor's address, or None."""
    return None if tensor is None else tensor.data_ptr()
