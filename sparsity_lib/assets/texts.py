"""Plain text by role and source: deduplicated, disjoint between roles, and cut into sequences of tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import xxhash

from sparsity_lib.assets.benchmarks import benchmark_configs, benchmark_names, load_benchmark
from sparsity_lib.assets.cache import cache_folder, write_text
from sparsity_lib.assets.overlap import all_runs, overlapping
from sparsity_lib.assets.sources import ROLES, SOURCES
from sparsity_lib.errors import AssetError, SparsityError, refuse, unknown
from sparsity_lib.progress import track

#: Raised when the reading, cleaning or splitting of texts changes; results name it.
VERSION = 1
_BATCH = 256


def sources(role: str) -> list[str]:
    """Names of the sources that have `role` ("calibration", "training" or "evaluation"), in the table's order."""
    if role not in ROLES:
        raise unknown("role", role, ROLES)
    return [name for name, source in SOURCES.items() if source.role == role]


def passages(role: str, source: str | None = None) -> list[str]:
    """The passages of one source, or of all sources of the role in the table's order; the same on every machine.

    Each is unique; none of a calibration or training source shares a run of 13 words with evaluated text, none of a
    training source with calibration text. Read once and kept in the cache.
    Raises SparsityError for an unknown role, or a source that does not have that role; AssetError as `asset_path` does.
    """
    return [passage for name in _chosen(role, source) for passage in _passages(name)]


def token_sequences(
    tokenizer: Any, role: str, *, tokens: int, length: int, source: str | None = None, seed: int = 0,
) -> torch.LongTensor:
    """Sequences of text for one role, [tokens // length, length].

    Passages of a source are shuffled by `seed`, tokenised, joined with an end-of-document token between them and cut
    into full sequences; for a tokenizer that puts a token at the start of its text (Gemma's BOS), each sequence begins
    with it and it counts towards `length`. Without `source`, sequences come from all sources of the role in turn,
    until one is used up. A smaller `tokens` gives the first sequences of a larger one.
    Raises SparsityError for an unknown role or source, for `tokens` < `length`, `length` < 2, and for more tokens than
    there are, saying how many there are.
    """
    names = _chosen(role, source)
    for label, value, least in (("length", length, 2), ("tokens", tokens, length), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise refuse(label, value, f"a whole number of at least {least}")
    wanted = tokens // length
    rows: list[list[int]] = []
    running = [_sequences(tokenizer, name, length, seed) for name in names]
    while running and len(rows) < wanted:
        for stream in list(running):
            row = next(stream, None)
            if row is None:
                running.remove(stream)
            else:
                rows.append(row)
    if len(rows) < wanted:
        where = f"source {source!r} gives" if source else f"all {role} sources together give"
        raise refuse("tokens", tokens, f"at most {len(rows) * length}, all that {where} in sequences of {length}")
    return torch.tensor(rows[:wanted], dtype=torch.long)


def _sequences(tokenizer: Any, name: str, length: int, seed: int) -> Iterator[list[int]]:
    """Full sequences of one source, tokenised only as far as they are asked for."""
    order = list(_passages(name))
    random.Random(f"{name}/{seed}").shuffle(order)
    start, end = start_tokens(tokenizer), document_end(tokenizer)
    body, waiting = length - len(start), []
    for place in range(0, len(order), _BATCH):
        for ids in tokenizer(order[place : place + _BATCH], add_special_tokens=False, verbose=False).input_ids:
            waiting += ids + end
        taken = 0
        while len(waiting) - taken >= body:
            yield start + waiting[taken : taken + body]
            taken += body
        waiting = waiting[taken:]


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: [BOS] for Gemma and Llama, [CLS] for BERT, nothing for SmolLM2."""
    first = tokenizer("a").input_ids[0]
    return [first] if first in tokenizer.all_special_ids else []


def document_end(tokenizer: Any) -> list[int]:
    """The token between documents: the one of pretraining where an instruction model ends its turns with another."""
    vocabulary = tokenizer.get_vocab()
    for token in ("<|endoftext|>", tokenizer.eos_token, tokenizer.sep_token):
        if token in vocabulary:
            return [vocabulary[token]]
    return []


def _chosen(role: str, source: str | None) -> list[str]:
    names = sources(role)
    if source is None:
        return names
    if source not in SOURCES:
        raise unknown(f"{role} source", source, names)
    if source not in names:
        raise SparsityError(
            f"source = {source!r} is {SOURCES[source].role} text and never used for {role}. "
            f"Fix: choose one of {', '.join(names)}."
        )
    return [source]


@cache
def _passages(name: str) -> tuple[str, ...]:
    """The clean passages of one source, from the cache folder where they are, checked against the table's digest."""
    path = cache_folder() / "texts" / f"v{VERSION}" / f"{name}.json"
    if not path.exists():
        write_text(path, json.dumps(clean_passages(name), ensure_ascii=False))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        good = (len(found), digest(found)) == (SOURCES[name].passages, SOURCES[name].digest)
    except (ValueError, TypeError):
        good = False
    if not good:
        raise AssetError(f"{path} is not the {name!r} text that results were made with. Fix: delete it and run again.")
    return tuple(found)


def digest(found: list[str]) -> str:
    """xxh3 checksum of a list of passages, order included."""
    return xxhash.xxh3_64_hexdigest("\0".join(found).encode())


def clean_passages(name: str) -> list[str]:
    """The passages of one source read anew: unique, and free of what overlaps with text that has a prior claim."""
    found = list(dict.fromkeys(passage.strip() for passage in SOURCES[name].read()))
    found = [passage for passage in found if passage]
    hit = overlapping(found, _protected(SOURCES[name].role))
    return [passage for place, passage in enumerate(found) if place not in hit]


@cache
def _protected(role: str) -> np.ndarray:
    """Word runs that the passages of `role` must not share: nothing for evaluation, more for each later role."""
    if role == "evaluation":
        return np.empty(0, dtype=np.uint64)
    earlier = ROLES[: ROLES.index(role)]
    runs = [all_runs(passages(other)) for other in earlier]
    return np.unique(np.concatenate([*runs, _benchmark_runs()]))


@cache
def _benchmark_runs() -> np.ndarray:
    return all_runs(_benchmark_text())


def _benchmark_text() -> Iterator[str]:
    """Every document of every benchmark, its text fields joined."""
    for name in track(benchmark_names(), "keeping benchmark text out", unit="set"):
        for config, splits in benchmark_configs(name).items():
            for split in splits:
                for row in load_benchmark(name, config, split):
                    yield " ".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
