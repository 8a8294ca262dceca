"""Attention over packed tries in blocks of queries, on processors.

A tree of a thousand tokens read with one mask computes a million scores a head, most of which the mask drops: a question
need not look at the other questions. Here consecutive nodes form blocks, and each block is given only those keys that one
of its nodes sees: the trunk that they share and the block itself. Trees of one forward pass lie one after the other in a
single row, so that nothing is padded either.

transformers lets a model look its attention up by name, and hands every layer the mask of its type. So the mask of a layer
type is a single number here, which says by which of the pass's block lists to attend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.bench_trie import Pack, ancestor_mask

#: The name under which transformers finds `attend`.
NAME = "sparsity_tree_blocks"
#: Nodes of a block. Smaller ones see fewer keys in vain, larger ones make fewer calls.
BLOCK = 64


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) of a row, the keys that they see between them, and which sees which.

    `keys`: a slice where they are consecutive, else int64 [keys]. `mask`: additive [1, 1, stop - start, keys].
    """

    start: int
    stop: int
    keys: slice | Tensor
    mask: Tensor


_lists: ContextVar[tuple[Sequence[Block], ...]] = ContextVar("block lists of the running forward pass")


def blocks(packs: Sequence[Pack], dtype: torch.dtype, window: int | None = None, size: int = BLOCK) -> list[Block]:
    """Blocks for `packs` laid one after the other in a row.

    `window`: a node sees only ancestors that lie less than this many positions back.
    """
    found, offset = [], 0
    for pack in packs:
        visible = ancestor_mask(pack, len(pack)).numpy()
        if window is not None:
            visible &= pack.positions[:, None] - pack.positions[None] < window
        for start in range(0, len(pack), size):
            rows = visible[start : start + size]
            keys = np.flatnonzero(rows.any(0))
            mask = torch.zeros(len(rows), len(keys), dtype=dtype)
            mask.masked_fill_(torch.from_numpy(~rows[:, keys]), torch.finfo(dtype).min)
            keys = keys + offset
            found.append(Block(
                start + offset, start + offset + len(rows),
                slice(int(keys[0]), int(keys[-1]) + 1) if keys[-1] - keys[0] + 1 == len(keys) else torch.from_numpy(keys),
                mask[None, None],
            ))
        offset += len(pack)
    return found


@contextmanager
def attending(config: PreTrainedConfig, lists: Sequence[Sequence[Block]]) -> Iterator[list[Tensor]]:
    """Let the model of `config` attend by blocks; yields the mask to pass for each list."""
    before, token = config._attn_implementation, _lists.set(tuple(lists))
    config._attn_implementation = NAME
    try:
        yield [torch.full((1, 1, 1, 1), number) for number in range(len(lists))]
    finally:
        config._attn_implementation = before
        _lists.reset(token)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float = 0.0,
    scaling: float | None = None, **options: object,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: query [1, heads, nodes, d], key [1, key heads, nodes, d] -> [1, nodes, heads, d].

    Raises
    ------
    SparsityError
        For what only some models do to their scores, such as capping them.
    """
    for name in ("softcap", "position_bias", "s_aux"):
        if options.get(name) is not None:
            raise SparsityError(f"{type(module).__name__} attends with {name}, which attention by blocks does not know.")
    # Query heads that share a key head become a batch, over which keys and values repeat without being copied.
    shared = query.shape[1] // key.shape[1]
    query = query[0].unflatten(0, (key.shape[1], shared)).transpose(0, 1)
    out = query.new_empty(query.shape[2], query.shape[1], shared, value.shape[-1])
    for block in _lists.get()[int(attention_mask)]:
        keys, values = (
            x[:, :, block.keys] if isinstance(block.keys, slice) else x.index_select(2, block.keys) for x in (key, value)
        )
        part = scaled_dot_product_attention(
            query[:, :, block.start : block.stop], keys.expand(shared, -1, -1, -1), values.expand(shared, -1, -1, -1),
            attn_mask=block.mask, scale=scaling,
        )
        out[block.start : block.stop] = part.permute(2, 1, 0, 3)
    return out.flatten(1, 2)[None], None


AttentionInterface.register(NAME, attend)
