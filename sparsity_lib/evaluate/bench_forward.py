"""Log-likelihoods of continuations from one forward pass over packed tries: masks, positions, and the head in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sparsity_lib import lm
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.bench_trie import Pack, ancestor_mask

#: Most logits held at one time (elements): Gemma's vocabulary of 262,144 makes 64 rows of them.
LOGITS_AT_ONCE = 1 << 24


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

    Raises
    ------
    SparsityError
        If the model has no decoder stack or no language model head to call by itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.causal = inner_model(model)
        self.decoder = getattr(self.causal, "base_model", None)
        self.head = self.causal.get_output_embeddings() if hasattr(self.causal, "get_output_embeddings") else None
        if self.decoder is None or self.decoder is self.causal or self.head is None:
            raise SparsityError(f"{type(model).__name__} has no separate decoder and language model head to run packed.")
        self.config = self.causal.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def attention_mask(self, packs: Sequence[Pack], width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive mask [packs, 1, width, width] (0 or the dtype's lowest), or one per layer type of the model.

        A sliding window of w tokens keeps the ancestors that lie less than w positions back.
        """
        visible = torch.stack([ancestor_mask(pack, width) for pack in packs]).to(self.device)
        window = getattr(self.config, "sliding_window", None)
        types = set(getattr(self.config, "layer_types", None) or ())
        if types <= {"full_attention"} and (types or not window):
            return self._additive(visible)
        positions = _padded([pack.positions for pack in packs], width).to(self.device)
        near = positions[:, :, None] - positions[:, None, :] < (window or width + int(positions.max()))
        sliding = self._additive(visible & near)
        return {"full_attention": self._additive(visible), "sliding_attention": sliding} if types else sliding

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        dtype = self.head.weight.dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def hidden(self, packs: Sequence[Pack]) -> torch.Tensor:
        """Last hidden states [packs, nodes of the longest pack, channels]."""
        width = max(len(pack) for pack in packs)
        return self.decoder(
            input_ids=_padded([pack.tokens for pack in packs], width).to(self.device),
            position_ids=_padded([pack.positions for pack in packs], width).to(self.device),
            attention_mask=self.attention_mask(packs, width),
            use_cache=False,
        )[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] in float32."""
        return lm.logits(self.causal, hidden)

    @torch.inference_mode()
    def score(self, packs: Sequence[Pack], queries: Sequence[Sequence[Query]]) -> list[tuple[int, float, bool]]:
        """(request, log-likelihood, whether greedy decoding would produce it) for the queries of each pack."""
        flat = [(row, query) for row, group in enumerate(queries) for query in group]
        nodes = np.concatenate([
            row * (1 << 32) + packs[row].paths[query.sequence][query.start : query.start + len(query.targets)]
            for row, query in flat
        ])
        targets = torch.tensor([token for _, query in flat for token in query.targets], device=self.device)
        owner = np.repeat(np.arange(len(flat)), [len(query.targets) for _, query in flat])
        asked, where = np.unique(nodes, return_inverse=True)
        rows, columns = torch.from_numpy(asked >> 32), torch.from_numpy(asked & 0xFFFFFFFF)
        states = self.hidden(packs)[rows.to(self.device), columns.to(self.device)]
        logp, greedy = self._token_scores(states, torch.from_numpy(where).to(self.device), targets)
        total = np.bincount(owner, weights=logp, minlength=len(flat))
        misses = np.bincount(owner, weights=~greedy, minlength=len(flat))
        return [(query.request, float(total[i]), misses[i] == 0) for i, (_, query) in enumerate(flat)]

    def _token_scores(
        self, states: torch.Tensor, where: torch.Tensor, targets: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p of `targets[i]` after state `where[i]`, and whether it is the most likely token; few logits at a time."""
        step = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        logp = torch.empty(len(targets), dtype=torch.float64, device=states.device)
        greedy = torch.empty(len(targets), dtype=torch.bool, device=states.device)
        for first in range(0, len(states), step):
            logits = self.logits(states[first : first + step])
            normaliser, top = logits.logsumexp(dim=-1), logits.argmax(dim=-1)
            mine = ((where >= first) & (where < first + step)).nonzero()[:, 0]
            row, token = where[mine] - first, targets[mine]
            logp[mine] = (logits[row, token] - normaliser[row]).double()
            greedy[mine] = top[row] == token
        return logp.cpu().numpy(), greedy.cpu().numpy()


def _padded(rows: Sequence[np.ndarray], width: int) -> torch.Tensor:
    out = torch.zeros(len(rows), width, dtype=torch.long)
    for row, values in enumerate(rows):
        out[row, : len(values)] = torch.from_numpy(values)
    return out
