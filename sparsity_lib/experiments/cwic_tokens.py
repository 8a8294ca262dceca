"""Kinds of tokens by what the papers say of their compute, and texts whose parts are known: template, question, answer."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsity_lib.errors import SparsityError
from sparsity_lib.train.packing import PADDING

#: Kinds in the order in which they are looked for; a token is of the first that fits.
KINDS = {
    "first": "the first token of a text",
    "template": "tokens of the chat format: roles, the system's prompt, ends of turns",
    "punctuation": "no letter and no digit",
    "filler": "articles, prepositions, pronouns, conjunctions, auxiliary verbs",
    "repeated": "part of three tokens or more that stood in the text before",
    "other": "all else",
}
FILLER = frozenset(
    "a an the and or but nor so yet if then than that this these those there here as at by for from in into of off on onto out "
    "over to up with about after before between during through under while is am are was were be been being do does did have "
    "has had will would can could may might shall should must not no it its he his him she her they their them we our us you "
    "your i my me who whom whose which what when where why how also however very just only".split())
#: Length of a span that counts as repeated.
SPAN = 3


@dataclass(frozen=True)
class Marked:
    """A text as token ids; body: from and to which token the text itself goes, what is outside being template."""

    ids: tuple[int, ...]
    start: int
    end: int


def kinds_of(ids: Sequence[int], pieces: Sequence[str], start: int = 0, end: int | None = None) -> list[str]:
    """The kind of each token, by its text and those before it.

    Parameters
    ----------
    pieces
        The tokens' texts, spaces included.
    start, end
        Tokens outside are template.
    """
    end = len(ids) if end is None else end
    again = _repeated(ids, start, end)
    found = []
    for place, piece in enumerate(pieces):
        word = piece.strip().lower()
        if not start <= place < end:
            kind = "template"
        elif place == 0:
            kind = "first"
        elif not any(c.isalnum() for c in word):
            kind = "punctuation"
        elif word.strip(string.punctuation) in FILLER and piece[:1].isspace():
            kind = "filler"
        else:
            kind = "repeated" if place in again else "other"
        found.append(kind)
    return found


def _repeated(ids: Sequence[int], start: int, end: int) -> set[int]:
    """Places inside spans of `SPAN` tokens that stood earlier, without overlap, between start and end."""
    seen: dict[tuple[int, ...], int] = {}
    found: set[int] = set()
    for place in range(start, end - SPAN + 1):
        span = tuple(ids[place : place + SPAN])
        if span in seen and seen[span] + SPAN <= place:
            found.update(range(place, place + SPAN))
        seen.setdefault(span, place)
    return found


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's text by itself."""
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]


def marked(tokenizer: Any, body: str, answer: str = "") -> Marked:
    """A question, and an answer, in the tokenizer's chat format where it has one; the parts are tokenised apart."""
    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    if not getattr(tokenizer, "chat_template", None):
        ids = tokens(body + answer)
        return Marked(tuple(ids), 0, len(ids))
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True)
    before, _, after = whole.partition("\0")
    head, middle = tokens(before), tokens(body)
    ids = [*head, *middle, *tokens(after), *tokens(answer)]
    return Marked(tuple(ids), len(head), len(head) + len(middle))


def question(document: Mapping[str, Any]) -> str:
    """An ARC document as a question with its lettered options."""
    options = zip(document["choices"]["label"], document["choices"]["text"], strict=True)
    return document["question"] + "".join(f"\n{label}. {text}" for label, text in options)


def padded(texts: Sequence[Marked]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, segments (1, and 0 for padding) and which tokens are the text's own, each [texts, tokens]."""
    if not texts:
        raise SparsityError("There is no text to look at. Fix: at least one.")
    width = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    segments, own = torch.full_like(ids, PADDING), torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        segments[row, : len(text.ids)] = 1
        own[row, text.start : text.end] = True
    return ids, segments, own
