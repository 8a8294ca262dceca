"""Where granular models compute: by layer, matrix, channel, stripe and head of attention; by question; by token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from sparsity_lib.assets.benchmarks import load_benchmark
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.cwic import measure
from sparsity_lib.cwic.shipped import load_shipped
from sparsity_lib.experiments import common
from sparsity_lib.experiments.cwic_common import densities, head_of
from sparsity_lib.experiments.cwic_tokens import KINDS, kinds_of, marked, padded, pieces_of, question

MODELS = ("smollm2-cwic-3x", "small-llama-cwic-6x")
TEXT = {"sequences": 8, "length": 256}
#: Questions of each difficulty, drawn at random; longer ones than this are left out.
QUESTIONS = {"documents": 150, "longest": 160, "seed": 0}
#: Conversations that are shown token by token.
SHOWN = (
    "What is 6 * 7? Explain how 6 * 7 can be computed by adding.",
    "Why is the color of the sky blue? However, at sunset the color of the sky is red: why?",
    'Translate the words "good morning" and "thank you" to French, and repeat the words "good morning" twice.',
)
ANSWER = 60
#: Text whose tokens are counted along the vocabulary.
COUNTED = {"tokens": 65_536, "length": 512, "seed": 0}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and view."""
    views = {"frequencies": frequencies, "arc": arc, "kinds": kinds, "shown": shown}
    asked = {"frequencies": {"text": TEXT, "counted": COUNTED}, "arc": QUESTIONS, "kinds": {"text": TEXT},
             "shown": {"texts": SHOWN, "answer": ANSWER}}
    wanted = [({"model": name, "view": view, **asked[view]}, partial(make, name, asked[view]))
              for name in MODELS for view, make in views.items()]
    found = iter(checkpoint.items(wanted))
    data = {name: {view: next(found) for view in views} for name in MODELS}
    return data, {"models": MODELS, **asked}, [0]


def frequencies(name: str, params: dict) -> dict[str, Any]:
    """Shares read by role and block; how often each channel passes, in percent, mean over stripes, and each stripe of the first,
    middle and last gate; the head's stripes, and how often the tokens of each occur in text."""
    model, tokenizer = load_shipped(name)
    ids = common.evaluation_ids(tokenizer, **params["text"])
    activity = measure(model, ids)
    channels: dict[str, list[list[int]]] = {}
    gates: list[list[list[int]]] = []
    for layer, _, role, _ in activity.layers:
        if role in ("q", "k", "v", "o", "gate"):
            channels.setdefault(role, []).append(percent(activity.frequency[layer].mean(0)))
        if role == "gate":
            gates.append([percent(row) for row in activity.frequency[layer]])
    config = model.config.get_text_config()
    head = next(layer for layer, _, role, _ in activity.layers if role == "head")
    width = model.get_submodule(head).stripe
    return {"density": densities(activity), "channels": channels, "ratio": activity.ratio(), "heads": config.num_attention_heads,
            "gates": {str(i): gates[i] for i in (0, len(gates) // 2, len(gates) - 1)}, **head_of(activity),
            "occurrences": occurrences(tokenizer, width, len(activity.frequency[head]), params["counted"])}


def percent(values: torch.Tensor) -> list[int]:
    """Shares in whole percent."""
    return (100 * values).round().int().tolist()


def occurrences(tokenizer: Any, width: int, number: int, counted: dict) -> list[int]:
    """How many tokens of some calibration text belong to each stripe of the head."""
    ids = token_sequences(tokenizer, "calibration", **counted)
    return torch.bincount(ids.flatten() // width, minlength=number).tolist()


def arc(name: str, params: dict) -> dict[str, Any]:
    """Weights read by a token of each question and its options, mean over its tokens; and how many tokens it has."""
    model, tokenizer = load_shipped(name)
    found: dict[str, Any] = {}
    for config in ("ARC-Easy", "ARC-Challenge"):
        documents = load_benchmark("ai2_arc", config, split="test")
        order = np.random.default_rng(params["seed"]).permutation(len(documents))
        texts = (marked(tokenizer, question(documents[int(i)])) for i in order)
        chosen = [text for text, _ in zip((t for t in texts if len(t.ids) <= params["longest"]), range(params["documents"]),
                                          strict=False)]
        chosen.sort(key=lambda text: len(text.ids))  # rows of a batch are then of about one length
        read, tokens = [], []
        for start in range(0, len(chosen), 8):
            ids, segments, own = padded(chosen[start : start + 8])
            read += measure(model, ids, segments, batch_size=8).per_sequence(own).tolist()
            tokens += own.sum(1).tolist()
        found[config] = {"read": [round(v) for v in read], "tokens": tokens}
    return found


def kinds(name: str, params: dict) -> dict[str, Any]:
    """Weights read by tokens of each kind in evaluation text and in conversations: text -> kind -> [sum, tokens]."""
    model, tokenizer = load_shipped(name)
    ids = common.evaluation_ids(tokenizer, **params["text"])
    texts = [(row.tolist(), 0, len(row)) for row in ids]
    if getattr(tokenizer, "chat_template", None):
        texts += [(list(t.ids), t.start, t.end) for t in (marked(tokenizer, body) for body in SHOWN)]
    found = []
    for row, start, end in texts:
        read = measure(model, torch.tensor([row])).active_parameters()[0].tolist()
        sums = {kind: [0.0, 0] for kind in KINDS}
        for kind, value in zip(kinds_of(row, pieces_of(tokenizer, row), start, end), read, strict=True):
            sums[kind][0] += value
            sums[kind][1] += 1
        found.append({kind: pair for kind, pair in sums.items() if pair[1]})
    return {"texts": found}


def shown(name: str, params: dict) -> dict[str, Any]:
    """Some texts with each token's kind and the weights it read; a chat model's own greedy answer goes on the question."""
    model, tokenizer = load_shipped(name)
    chat = bool(getattr(tokenizer, "chat_template", None))
    found = []
    for body in params["texts"]:
        text = marked(tokenizer, body)
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=params["answer"], do_sample=False,
                                   pad_token_id=0)[0].tolist()
        read = measure(model, torch.tensor([whole])).active_parameters()[0].tolist()
        pieces = pieces_of(tokenizer, whole)
        named = kinds_of(whole, pieces, text.start, text.end)
        after = kinds_of(whole, pieces, len(text.ids), len(whole)) if chat else named
        tokens = [[piece, round(value), after[i] if i >= len(text.ids) else named[i]]
                  for i, (piece, value) in enumerate(zip(pieces, read, strict=True))]
        found.append({"prompt": len(text.ids), "tokens": tokens})
    dense = measure(model, torch.tensor([marked(tokenizer, params["texts"][0]).ids])).dense
    return {"texts": found, "dense": dense}
