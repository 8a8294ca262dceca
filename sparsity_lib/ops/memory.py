"""Memory for packed weights: aligned to cache lines, and on huge pages where it is large.

Skipping rows jumps through a matrix, and with pages of 4 kB nearly each row kept costs a walk through the page tables.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading

import torch
from torch import Tensor

LINE, HUGE = 64, 2 << 20
_MADV_HUGEPAGE = 14


#: Small weights share pieces of this size: alone they would be too short for a huge page.
PIECE = 16 << 20


class _Piece(threading.local):
    """What is left of the piece that this thread's small weights come from; it lives as long as any of them."""

    rest: Tensor | None = None


_piece = _Piece()


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that start on a cache line and, where the system can, lie on huge pages."""
    size = math.prod(shape) * dtype.itemsize
    lines = -(-size // LINE) * LINE
    if lines >= PIECE // 4:
        return _aligned(size, HUGE if size >= HUGE else LINE).zero_().view(dtype).view(shape)
    if _piece.rest is None or len(_piece.rest) < lines:
        _piece.rest = _aligned(PIECE, HUGE)
    found, _piece.rest = _piece.rest[:size], _piece.rest[lines:]
    return found.zero_().view(dtype).view(shape)


def _aligned(size: int, start: int) -> Tensor:
    """Bytes from a multiple of `start` on, untouched: memory is taken when it is first written."""
    raw = torch.empty(size + start, dtype=torch.uint8)
    offset = -raw.data_ptr() % start
    found = raw[offset : offset + size]
    if start == HUGE:
        _ask_for_huge_pages(found.data_ptr(), size)
    return found


def _ask_for_huge_pages(address: int, size: int) -> None:
    """A hint, which a kernel may ignore and other systems do not know."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        libc.madvise(address, size // HUGE * HUGE, _MADV_HUGEPAGE)
