"""Memory for packed weights: aligned to cache lines, and on huge pages where it is large.

Skipping rows jumps through a matrix, and with pages of 4 kB nearly each row kept costs a walk through the page tables.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch
from torch import Tensor

LINE, HUGE = 64, 2 << 20
_MADV_HUGEPAGE = 14


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that start on a cache line; from 2 MB on at a huge page's boundary, with huge pages asked for."""
    size = math.prod(shape) * dtype.itemsize
    start = HUGE if size >= HUGE else LINE
    raw = torch.empty(size + start, dtype=torch.uint8)
    offset = -raw.data_ptr() % start
    found = raw[offset : offset + size]
    if start == HUGE:
        _ask_for_huge_pages(found.data_ptr(), size)
    return found.zero_().view(dtype).view(shape)


def _ask_for_huge_pages(address: int, size: int) -> None:
    """A hint, which a kernel may ignore and other systems do not know."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        libc.madvise(address, size // HUGE * HUGE, _MADV_HUGEPAGE)
