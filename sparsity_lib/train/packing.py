"""Documents of different lengths in rows of one length, kept apart by the attention mask.

    rows = pack(chats(tokenizer, conversations), length=1024)      # {"input_ids": ..., "segments": ...}
    model(**model_inputs(model, rows["input_ids"], rows["segments"]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsity_lib.checks import count
from sparsity_lib.errors import SparsityError, refuse

#: The segment of padding.
PADDING = 0


def chats(tokenizer, conversations: Iterable[Sequence[Mapping[str, str]]]) -> list[list[int]]:
    """Token ids of conversations ([{"role": "user", "content": ...}, ...]) in the tokenizer's chat format.

    Raises
    ------
    SparsityError
        If the tokenizer has no chat format, or a conversation is empty or no list of messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        fix = "load the tokenizer of the instruction-tuned model, or set tokenizer.chat_template"
        raise SparsityError(f"The tokenizer has no chat format. Fix: {fix}.")
    found = []
    for conversation in conversations:
        good = isinstance(conversation, Sequence) and not isinstance(conversation, str) and len(conversation)
        if not good or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in conversation):
            raise refuse("conversation", conversation, 'a list of {"role": ..., "content": ...}, not empty')
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False)
        found.append(list(tokenizer(text, add_special_tokens=False).input_ids))  # the format brings its special tokens
    return found


def pack(documents: Iterable[Sequence[int]], length: int, padding: int = 0) -> dict[str, Tensor]:
    """Put documents into rows of `length` tokens; those that are longer are left out, as the CWIC papers do.

    The longest first, each into the first row with room for it, so that the result is one function of the documents.

    Returns
    -------
    dict
        input_ids [rows, length], and segments [rows, length]: 1, 2, ... for the documents of a row, 0 for padding.

    Raises
    ------
    SparsityError
        If no document is left.
    """
    count("length", length, minimum=2)
    given = [list(document) for document in documents]
    kept = [document for document in given if 2 <= len(document) <= length]
    if not kept:
        raise SparsityError(f"None of {len(given)} documents has 2 to {length} tokens. Fix: more text, or longer rows.")
    bins: list[list[list[int]]] = []
    rooms: list[int] = []
    for document in sorted(kept, key=len, reverse=True):
        place = next((i for i, room in enumerate(rooms) if room >= len(document)), len(rooms))
        if place == len(rooms):
            bins.append([])
            rooms.append(length)
        bins[place].append(document)
        rooms[place] -= len(document)
    ids = torch.full((len(bins), length), padding, dtype=torch.long)
    segments = torch.full_like(ids, PADDING)
    for row, inside in enumerate(bins):
        start = 0
        for number, document in enumerate(inside, 1):
            ids[row, start : start + len(document)] = torch.tensor(document)
            segments[row, start : start + len(document)] = number
            start += len(document)
    return {"input_ids": ids, "segments": segments}


def positions(segments: Tensor) -> Tensor:
    """Each token's place in its own document, from 0, for segments [rows, tokens]."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values


def block_mask(segments: Tensor) -> Tensor:
    """Who attends to whom: tokens of the same document, back only; boolean [rows, 1, tokens, tokens]."""
    tokens = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]  # padding sees padding, so that no row of the softmax is empty
    return (same & torch.ones(tokens, tokens, dtype=torch.bool, device=segments.device).tril())[:, None]


def model_inputs(model: nn.Module, ids: Tensor, segments: Tensor | None) -> dict[str, Tensor]:
    """Keyword inputs of a causal language model for packed rows; plain ones where `segments` is None.

    Raises
    ------
    SparsityError
        If the model's attention takes no masks of this form.
    """
    if segments is None:
        return {"input_ids": ids}
    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        fix = "load_model(..., attn_implementation='sdpa')"
        raise refuse("attention of the model", kind, "sdpa or eager for packed rows", fix)
    mask = block_mask(segments)
    if kind == "eager":  # added to the scores there
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(segments)}
