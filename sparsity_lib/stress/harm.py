"""Harm done to bytes and to plain data, at random places."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: What a hostile or careless hand might write in place of a value.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x" * 5000,
    "0.5", "../../etc/passwd", "/dev/zero", "os.system('true')", "__import__", "sparsity_lib.sweep", "$(touch owned)",
    "`id`; rm -rf x", "<script>alert(1)</script>", "{{7*7}}", "\x00", "\ud800", "ｇａｔｅ", [], {}, [[]], [None],
    {"kind": "topk"}, {"kind": ["topk"]}, {"kind": {"kind": "topk"}}, {"__class__": "object"}, {"py/object": "os.system"},
    [0.5] * 1000,
)


def nested(depth: int) -> list:
    """A list in a list in a list ..."""
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def data(value: Any, draw: random.Random) -> Any:
    """Plain data with one to three of its values replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return draw.choice(HOSTILE)
        holder, key = draw.choice(places)
        kind = draw.random()
        if kind < 0.55:
            holder[key] = copy.deepcopy(draw.choice(HOSTILE))
        elif kind < 0.6:
            holder[key] = nested(draw.choice([10, 200, 900]))
            break  # nothing walks through it again
        elif kind < 0.75:
            del holder[key]
        elif kind < 0.85 and isinstance(holder, dict):
            holder[draw.choice(["kind", "trust_remote_code", "__class__", "module", "x" * 300, "", "density", key.upper()])] = (
                copy.deepcopy(draw.choice(HOSTILE)))
        else:
            other, name = draw.choice(places)
            try:
                holder[key] = copy.deepcopy(other[name])
            except (KeyError, IndexError):
                continue  # its holder was removed in between
    return value


def _places(value: Any) -> Any:
    """(holder, key) of everything inside."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(entries):
        yield value, key
        yield from _places(inside)


def text(value: Any, draw: random.Random) -> str:
    """`data` as JSON text, sometimes with NaN, doubled keys or a great depth, sometimes harmed as bytes are."""
    found = json.dumps(data(value, draw))
    kind = draw.random()
    if kind < 0.1:
        return "[" * draw.choice([50, 990, 5000]) + found
    if kind < 0.3:
        return bytes_(found.encode(), draw).decode("utf-8", "replace")
    return found


def truncated(whole: bytes, draw: random.Random) -> bytes:
    """A beginning of a file, shorter than the whole."""
    return whole[: draw.randrange(len(whole))]


def flipped(whole: bytes, draw: random.Random) -> bytes:
    """The file with one bit turned."""
    found = bytearray(whole)
    found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def bytes_(whole: bytes, draw: random.Random) -> bytes:
    """A file cut, flipped, overwritten, lengthened, or with two pieces exchanged."""
    kind = draw.randrange(6)
    if kind == 0 or not whole:
        return truncated(whole or b"x", draw)
    if kind == 1:
        return flipped(whole, draw)
    at, size = draw.randrange(len(whole)), draw.randint(1, 64)
    if kind == 2:
        return whole[:at] + draw.randbytes(size) + whole[at + size :]
    if kind == 3:
        return whole[:at] + draw.randbytes(size) + whole[at:]
    if kind == 4:
        return whole[:at] + b"\0" * min(size, len(whole) - at) + whole[at + size :]
    return whole[at:] + whole[:at]
