"""Which passages share a long run of words with protected text: the field's usual test for contamination.

Words are lower-cased runs of letters and digits, so that quotes, spacing and markup do not hide a copy. A run is
`RUN` = 13 words; a passage with fewer counts as one run, equal only to the same short passage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

RUN = 13
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers of it never vanish modulo 2^64
_BLOCK = 4096


class _Hashes(dict):
    """64-bit hashes of words, computed once each; 0 stands for the padding of short passages."""

    def __missing__(self, word: str) -> int:
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode()) if word else 0
        return found


_hashes = _Hashes()


def word_runs(passages: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of successive words within each passage, and the number of the passage that each belongs to.

    Returns two arrays of one length: uint64 hashes, int64 positions in `passages`. A passage without words has none.
    """
    words: list[str] = []
    lengths = np.zeros(len(passages), dtype=np.int64)
    for place, passage in enumerate(passages):
        found = _WORD.findall(passage.lower())
        if 0 < len(found) < RUN:
            found += [""] * (RUN - len(found))
        words += found
        lengths[place] = len(found)
    values = np.fromiter(map(_hashes.__getitem__, words), dtype=np.uint64, count=len(words))
    count = max(0, len(values) - RUN + 1)
    totals = np.zeros(count, dtype=np.uint64)
    for place in range(RUN):  # a polynomial in the word hashes, modulo 2^64
        totals = totals * _BASE + values[place : place + count]
    owners = np.repeat(np.arange(len(passages)), lengths)
    inside = owners[:count] == owners[len(owners) - count :]  # first and last word in the same passage
    return totals[inside], owners[:count][inside]


def all_runs(passages: Iterable[str]) -> np.ndarray:
    """Sorted distinct hashes of the word runs of all passages."""
    kept = list(passages)
    parts = [word_runs(kept[place : place + _BLOCK])[0] for place in range(0, len(kept), _BLOCK)]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


def overlapping(passages: Sequence[str], protected: np.ndarray) -> set[int]:
    """Positions of the passages that share a word run with `protected` (sorted hashes from `all_runs`)."""
    hit: set[int] = set()
    for place in range(0, len(passages) if len(protected) else 0, _BLOCK):
        runs, owners = word_runs(passages[place : place + _BLOCK])
        nearest = np.minimum(np.searchsorted(protected, runs), len(protected) - 1)
        hit.update(place + int(owner) for owner in np.unique(owners[protected[nearest] == runs]))
    return hit
