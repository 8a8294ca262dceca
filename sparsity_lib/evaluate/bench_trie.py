"""Packing token sequences that share prefixes, so that a model reads every shared token once.

A multiple-choice question asks for the likelihood of several endings after one and the same question, and a few-shot
prompt repeats its examples before every question. Sorted, such sequences form a tree (a *trie*): each node is a token,
each path from the root is a sequence. A decoder can read a whole tree in one forward pass if every node attends to its
ancestors only and is told its depth as its position.

Nothing here knows about models: sequences of integers come in, packs of integers come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

#: Length of a pack (tokens) at which what grows with its square costs as much as all linear layers; it sets the best size
#: of a pack. With a mask over the whole pack that is attention; by blocks, only building the blocks and the larger tensors.
WHOLE_PACK, BY_BLOCKS = 2000, 100_000
#: Fixed cost of a pack, in tokens: building the mask, padding.
PACK_OVERHEAD = 8


@dataclass(frozen=True)
class Pack:
    """A piece of the trie that is read in one row of a forward pass.

    `tokens`, `positions`: int64 [nodes], in depth-first order. `paths`: for each sequence of the pack, by its index in the
    list that was packed, the nodes [its length] that spell it. `runs`: for each sequence, (start, stop, shared, index): the
    nodes [start, stop) that it added, how many of its first tokens were there already, and which sequence it is.
    """

    tokens: np.ndarray
    positions: np.ndarray
    paths: dict[int, np.ndarray]
    runs: tuple[tuple[int, int, int, int], ...]

    def __len__(self) -> int:
        return len(self.tokens)


def shared_prefixes(ordered: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Length of the prefix that each sequence of a sorted list shares with the one before it (0 for the first)."""
    shared = np.zeros(len(ordered), dtype=np.int64)
    for index in range(1, len(ordered)):
        before, here = ordered[index - 1], ordered[index]
        length = 0
        for left, right in zip(before, here, strict=False):
            if left != right:
                break
            length += 1
        shared[index] = length
    return shared


def cut(lengths: np.ndarray, shared: np.ndarray, limit: int, doubling: int = WHOLE_PACK) -> list[tuple[int, int]]:
    """Cut sorted sequences into consecutive packs at the least total cost.

    A pack of N tokens costs N + N^2 / `doubling` + `PACK_OVERHEAD`. Cutting in front of a sequence makes
    the next pack repeat the prefix it shares, so long common prompts want long packs and short ones short packs. The best
    cuts are found exactly, by dynamic programming over the positions. Packs hold at most `limit` tokens, or one sequence
    that is longer than that.
    """
    count = len(lengths)
    added = np.concatenate([[0], np.cumsum(lengths - shared)])
    best = np.zeros(count + 1)
    start_of = np.zeros(count + 1, dtype=np.int64)
    first = 0
    for stop in range(1, count + 1):
        # A pack [start, stop) holds what its members add, plus the prefix that its first member has to repeat.
        while first < stop - 1 and added[stop] - added[first] + shared[first] > limit:
            first += 1
        starts = np.arange(first, stop)
        size = added[stop] - added[starts] + shared[starts]
        cost = best[starts] + size + size**2 / doubling + PACK_OVERHEAD
        cost[(size > limit) & (starts < stop - 1)] = np.inf
        choice = int(np.argmin(cost))
        best[stop], start_of[stop] = cost[choice], starts[choice]
    cuts, stop = [], count
    while stop > 0:
        cuts.append((int(start_of[stop]), stop))
        stop = int(start_of[stop])
    return cuts[::-1]


def build_pack(members: Sequence[tuple[int, tuple[int, ...]]], shared: Sequence[int]) -> Pack:
    """Lay out the trie of sorted (index, sequence) pairs; `shared[k]` is the prefix shared with member k - 1."""
    tokens: list[int] = []
    positions: list[int] = []
    paths: dict[int, np.ndarray] = {}
    runs = []
    path = np.zeros(0, dtype=np.int64)
    for (index, sequence), common in zip(members, [0, *shared[1:]], strict=True):
        start = len(tokens)
        tokens.extend(sequence[common:])
        positions.extend(range(common, len(sequence)))
        path = np.concatenate([path[:common], np.arange(start, len(tokens))])
        paths[index] = path
        runs.append((start, len(tokens), int(common), index))
    return Pack(np.asarray(tokens, np.int64), np.asarray(positions, np.int64), paths, tuple(runs))


def pack_sequences(sequences: Sequence[tuple[int, ...]], limit: int, doubling: int = WHOLE_PACK) -> list[Pack]:
    """Pack distinct, non-empty token sequences into tries of at most `limit` tokens where that is possible (see `cut`).

    Every sequence is in exactly one pack, under its index in `sequences`.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[index] for index in order]
    shared = shared_prefixes(ordered)
    lengths = np.asarray([len(sequence) for sequence in ordered], dtype=np.int64)
    members = list(zip(order, ordered, strict=True))
    return [build_pack(members[a:b], shared[a:b].tolist()) for a, b in cut(lengths, shared, limit, doubling)]


def ancestor_mask(pack: Pack, width: int) -> torch.Tensor:
    """Bool [width, width]: which node (row) attends to which (column): itself and its ancestors.

    Rows past the end of the pack are padding and attend to themselves, as a row without any entry has no softmax.
    """
    mask = np.zeros((width, width), dtype=bool)
    longest = max(stop - start for start, stop, _, _ in pack.runs)
    triangle = np.tri(longest, dtype=bool)
    for start, stop, common, index in pack.runs:
        if common:  # what the last shared token sees
            mask[start:stop] = mask[pack.paths[index][common - 1]]
        mask[start:stop, start:stop] = triangle[: stop - start, : stop - start]
    padding = np.arange(len(pack), width)
    mask[padding, padding] = True
    return torch.from_numpy(mask)


def batches(packs: Sequence[Pack], tokens: int, padded: bool = True) -> list[list[Pack]]:
    """Group packs into forward passes of at most `tokens` tokens, the longest first.

    `padded`: a pack takes as much as the longest of its pass.
    """
    groups: list[list[Pack]] = []
    left = 0
    for pack in sorted(packs, key=len, reverse=True):
        needed = len(groups[-1][0]) if groups and padded else len(pack)
        if groups and needed <= left:
            groups[-1].append(pack)
        else:
            groups.append([pack])
            left, needed = tokens, len(pack)
        left -= needed
    return groups
