"""The numbers of a run, kept beside the committed notebook and compared by tolerance on any other machine.

A notebook's text may be compared letter by letter, its floating-point numbers may not: another processor
rounds differently. So they are shown marked (see report.py), and recorded here with the tolerance that the
author grants each.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from . import project
from .errors import SparsityError, refuse

#: The folder that fresh records go to; without it, `runs/records` (so a reader's rerun overwrites nothing).
SWITCH = "SPARSITY_RECORDS"


def folder() -> Path:
    """Where a record written now will be."""
    chosen = os.environ.get(SWITCH)
    if chosen:
        return Path(chosen)
    try:
        return project.root() / "runs" / "records"
    except SparsityError:
        return Path.cwd() / "runs" / "records"


class Records:
    """The record of one notebook: a name and its numbers, written whole after each addition."""

    def __init__(self, name: str) -> None:
        if not name.replace("-", "_").isidentifier():
            raise refuse("name of a record", name, "letters, digits, '_' and '-'")
        self.name = name
        self.entries: dict[str, dict[str, Any]] = {}
        self.path = folder() / f"{name}.json"
        self._write()

    def add(
        self, key: str, value: float | int | str | bool | list[float], *, rtol: float = 0.0, atol: float = 0.0,
        between: tuple[float, float] | None = None,
    ) -> None:
        """Record a value.

        A later run must be within `atol + rtol * |committed|` of it (0 and 0: equal), or, for what has no
        committed value worth keeping (times), inside `between`. Raises SparsityError for NaN and infinities,
        a key used twice, and a tolerance that could never fail.
        """
        value = _plain(value)
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise refuse(f"record {key}", value, "finite numbers")
        if key in self.entries:
            raise SparsityError(f"record {key!r} of {self.name} is written twice. Fix: give each its own name.")
        if not (0 <= rtol < 1 and 0 <= atol < math.inf):
            raise refuse(f"tolerance of {key}", (rtol, atol), "rtol in [0, 1) and a finite atol >= 0")
        entry: dict[str, Any] = {"value": value, "rtol": rtol, "atol": atol}
        if between is not None:
            entry = {"between": list(between)}
            if not (isinstance(value, float | int) and between[0] <= value <= between[1]):
                raise refuse(f"record {key}", value, f"a number in [{between[0]:g}, {between[1]:g}]")
        self.entries[key] = entry
        self._write()

    def _write(self) -> None:
        text = json.dumps({"name": self.name, "entries": self.entries}, indent=1, sort_keys=True, allow_nan=False)
        project.write_atomic(self.path, text + "\n")


def _plain(value: Any) -> Any:
    """Python's own number for NumPy's or torch's; lists of them too."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if not isinstance(value, bool | int | float | str):
        raise refuse("record", value, "a number, a text, or a list of numbers")
    return value


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a record file; raises SparsityError where it is missing or damaged."""
    try:
        entries = json.loads(path.read_text())["entries"]
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("its entries are not those of a record")
        return entries
    except FileNotFoundError:
        raise SparsityError(f"there is no record {path}. Fix: the notebook must call report.start(...).") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SparsityError(f"{path} is not a record: {error}. Fix: make refresh") from None


def differences(committed: dict[str, dict[str, Any]], fresh: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each key that is missing, new, or further from the committed value than its tolerance."""
    lines = [f"{key}: committed, but the run did not record it" for key in sorted(committed.keys() - fresh.keys())]
    lines += [f"{key}: recorded by the run, but not committed" for key in sorted(fresh.keys() - committed.keys())]
    for key in sorted(committed.keys() & fresh.keys()):
        old, new = committed[key], fresh[key]
        rules_old = {name: rule for name, rule in old.items() if name != "value"}
        rules_new = {name: rule for name, rule in new.items() if name != "value"}
        if rules_old != rules_new:
            lines.append(f"{key}: the notebook now grants {rules_new}, the committed record {rules_old}")
        elif "value" in old and not _close(old["value"], new["value"], old.get("rtol", 0.0), old.get("atol", 0.0)):
            lines.append(
                f"{key}: {new['value']} here, {old['value']} committed (rtol {old['rtol']}, atol {old['atol']})")
    return lines


def _close(old: Any, new: Any, rtol: float, atol: float) -> bool:
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_close(a, b, rtol, atol) for a, b in zip(old, new, strict=True))
    numbers = all(isinstance(value, float | int) and not isinstance(value, bool) for value in (old, new))
    return abs(new - old) <= atol + rtol * abs(old) if numbers else old == new
