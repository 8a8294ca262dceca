"""Log-likelihoods of continuations from one forward pass over packed tries: layout, masks, and the head in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sparsity_lib import lm
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.bench_attention import attending, blocks
from sparsity_lib.evaluate.bench_trie import Pack, ancestor_mask

#: Most logits held at one time (elements): Gemma's vocabulary of 262,144 makes 32 rows of them, 32 MB in float32.
LOGITS_AT_ONCE = 1 << 23
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Query:
    """One continuation to score: which sequence it is read from, from which position on, and its tokens."""

    request: int
    sequence: int
    start: int
    targets: tuple[int, ...]


def inner_model(model: nn.Module) -> nn.Module:
    """The causal language model itself, out of wrappers such as peft's."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


class PackedForward:
    """Runs a Hugging Face decoder over packed tries.

    By blocks, the packs of a pass lie one after the other in a row and attention is that of
    :mod:`~sparsity_lib.evaluate.bench_attention`. Otherwise each has its own row, filled up to the longest, and a mask of
    the row's width squared: slower, but every model that takes a mask can do it.

    Raises
    ------
    SparsityError
        If the model has no decoder stack or no language model head to call by itself, or, by blocks, if it is not on a
        processor or has an attention of its own.
    """

    def __init__(self, model: nn.Module, by_blocks: bool = False) -> None:
        self.causal = inner_model(model)
        self.decoder = getattr(self.causal, "base_model", None)
        self.head = self.causal.get_output_embeddings() if hasattr(self.causal, "get_output_embeddings") else None
        if self.decoder is None or self.decoder is self.causal or self.head is None:
            raise SparsityError(f"{type(model).__name__} has no separate decoder and language model head to run packed.")
        self.config = self.causal.config.get_text_config()
        self.by_blocks = by_blocks
        if by_blocks and (self.device.type != "cpu" or self.config._attn_implementation != "sdpa"):
            raise SparsityError(f"Blocks are for attention named sdpa on a processor, not {self.config._attn_implementation!r}.")

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        dtype = self.head.weight.dtype
        return dtype if dtype.is_floating_point else torch.float32

    def _windows(self) -> dict[str, int | None]:
        """How far back a node sees, by type of layer; the type is "" where all layers are alike."""
        window = getattr(self.config, "sliding_window", None)
        types = set(getattr(self.config, "layer_types", None) or ())
        if types <= {"full_attention"}:
            return {"": None if types else window or None}
        return {"full_attention": None, "sliding_attention": window or None}

    def attention_mask(self, packs: Sequence[Pack], width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive mask [packs, 1, width, width] (0 or the dtype's lowest), or one per layer type of the model.

        A sliding window of w tokens keeps the ancestors that lie less than w positions back.
        """
        visible = torch.stack([ancestor_mask(pack, width) for pack in packs]).to(self.device)
        positions = _padded([pack.positions for pack in packs], width).to(self.device)
        back = positions[:, :, None] - positions[:, None, :]
        return _by_layer_type({
            kind: self._additive(visible if window is None else visible & (back < window))
            for kind, window in self._windows().items()
        })

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(self._dtype).min)[:, None]

    def places(self, packs: Sequence[Pack]) -> list[int]:
        """Where the first node of each pack is among the rows of `hidden`."""
        lengths = [len(pack) for pack in packs]
        steps = lengths if self.by_blocks else [max(lengths)] * len(packs)
        return [0, *np.cumsum(steps[:-1]).tolist()]

    def hidden(self, packs: Sequence[Pack]) -> torch.Tensor:
        """Last hidden states [nodes, channels]; those of a pack begin at its place (:meth:`places`)."""
        if not self.by_blocks:
            width = max(len(pack) for pack in packs)
            return self._decode(
                _padded([pack.tokens for pack in packs], width), _padded([pack.positions for pack in packs], width),
                self.attention_mask(packs, width),
            )
        windows = self._windows()
        with attending(self.config, [blocks(packs, self._dtype, window) for window in windows.values()]) as masks:
            tokens = torch.from_numpy(np.concatenate([pack.tokens for pack in packs]))
            positions = torch.from_numpy(np.concatenate([pack.positions for pack in packs]))
            return self._decode(tokens[None], positions[None], _by_layer_type(dict(zip(windows, masks, strict=True))))

    def _decode(self, tokens: torch.Tensor, positions: torch.Tensor, mask: object) -> torch.Tensor:
        states = self.decoder(
            input_ids=tokens.to(self.device), position_ids=positions.to(self.device), attention_mask=mask, use_cache=False
        )
        return states[0].flatten(0, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] in float32."""
        return lm.logits(self.causal, hidden)

    @torch.inference_mode()
    def score(self, packs: Sequence[Pack], queries: Sequence[Sequence[Query]]) -> list[tuple[int, float, bool]]:
        """(request, log-likelihood, whether greedy decoding would produce it) for the queries of each pack."""
        places = self.places(packs)
        flat = [(row, query) for row, group in enumerate(queries) for query in group]
        nodes = np.concatenate([
            places[row] + packs[row].paths[query.sequence][query.start : query.start + len(query.targets)]
            for row, query in flat
        ])
        targets = torch.tensor([token for _, query in flat for token in query.targets], device=self.device)
        owner = np.repeat(np.arange(len(flat)), [len(query.targets) for _, query in flat])
        asked, where = np.unique(nodes, return_inverse=True)
        states = self.hidden(packs)[torch.from_numpy(asked).to(self.device)]
        logp, greedy = self._token_scores(states, torch.from_numpy(where).to(self.device), targets)
        total = np.bincount(owner, weights=logp, minlength=len(flat))
        misses = np.bincount(owner, weights=~greedy, minlength=len(flat))
        return [(query.request, float(total[i]), misses[i] == 0) for i, (_, query) in enumerate(flat)]

    def _token_scores(
        self, states: torch.Tensor, where: torch.Tensor, targets: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p of `targets[i]` after state `where[i]`, and whether it is the most likely token; few logits at a time."""
        step = min(ROWS_AT_ONCE, max(1, LOGITS_AT_ONCE // self.config.vocab_size))
        logp = torch.empty(len(targets), dtype=torch.float64, device=states.device)
        greedy = torch.empty(len(targets), dtype=torch.bool, device=states.device)
        for first in range(0, len(states), step):
            scores = self.logits(states[first : first + step]).log_softmax(dim=-1)
            top = scores.argmax(dim=-1)
            mine = ((where >= first) & (where < first + step)).nonzero()[:, 0]
            row, token = where[mine] - first, targets[mine]
            logp[mine] = scores[row, token].double()
            greedy[mine] = top[row] == token
        return logp.cpu().numpy(), greedy.cpu().numpy()


def _by_layer_type(masks: dict[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
    return masks[""] if "" in masks else masks


def _padded(rows: Sequence[np.ndarray], width: int) -> torch.Tensor:
    out = torch.zeros(len(rows), width, dtype=torch.long)
    for row, values in enumerate(rows):
        out[row, : len(values)] = torch.from_numpy(values)
    return out
