"""Timing on a shared machine: every case once a round, medians over rounds, ratios within one run."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsity_lib.errors import SparsityError
from sparsity_lib.ops import library, memory
from sparsity_lib.progress import track

Case = Callable[[int], object]
#: Megabytes read before each case: more than the caches of most machines hold.
SWEEP = 128


@dataclass(frozen=True)
class Times:
    """Seconds of one case, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict:
        """Median, quartiles and best, in microseconds."""
        low, middle, high = (1e6 * q for q in statistics.quantiles(self.seconds, n=4))
        return {"median_us": middle, "low_us": low, "high_us": high, "best_us": 1e6 * min(self.seconds)}


def interleaved(
    cases: Mapping[str, Case], rounds: int = 21, warmup: int = 2, desc: str = "timing", rehearse: bool = False,
) -> dict[str, Times]:
    """Run every case once a round, in turn, so that what disturbs the machine disturbs all of them alike.

    Before each, untimed, the caches are swept by reading something else: masks of different sparsities share rows, and what
    the case before has left in a cache must not be what is timed. A case is called with the number of its round.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    sweep = ReadBandwidth(SWEEP)
    with torch.inference_mode():
        for turn in track(range(-warmup, rounds), desc=desc, unit="round"):
            for name, case in cases.items():
                sweep(turn)
                if rehearse:
                    case((turn + 1) % 1024)
                start = time.perf_counter()
                case(turn % 1024)
                seconds = time.perf_counter() - start
                if turn >= 0:
                    found[name].append(seconds)
    return {name: Times(tuple(each)) for name, each in found.items()}


class ReadBandwidth:
    """A case that reads memory as fast as the threads can: the limit of everything that is bound by bytes."""

    def __init__(self, megabytes: int = 256) -> None:
        self._native = library.load()
        if self._native is None:
            raise SparsityError("The bandwidth is measured by the compiled library, which is missing.")
        self.bytes = megabytes << 20
        self._buffer = memory.zeros((self.bytes,), torch.uint8)

    def __call__(self, turn: int) -> None:
        self._native.sparsity_read(
            ctypes.c_void_p(self._buffer.data_ptr()), ctypes.c_int64(self.bytes), torch.get_num_threads())


def by_length(points: Mapping[str, Any]) -> dict[int, Any]:
    """Points by the length of a context, rising: kept results have such keys as text, and sorted as text."""
    return {length: points[str(length)] for length in sorted(map(int, points))}
