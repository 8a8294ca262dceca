"""A bound on what a process may hold in memory, the system's cache of its files included: a control group of Linux."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
#: Folder of groups, the file of the bound, and that of the most that was held; the older form of control groups first.
_FORMS = (
    (_ROOT / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (_ROOT, "memory.max", "memory.peak"),
)


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path | None]:
    """A group that processes can `join`, of at most `limit` bytes in all; None where this system or user can make none.

    A process that needs more is killed by the system. The group goes when the context ends.
    """
    made = _make(limit)
    try:
        yield made
    finally:
        if made is not None:
            with contextlib.suppress(OSError):  # a process is left in it
                made.rmdir()


def _make(limit: int) -> Path | None:
    for folder, bound, _ in _FORMS:
        place = folder / f"sparsity-{os.getpid()}"
        try:
            if not (folder / "cgroup.procs").exists():
                continue
            place.mkdir()
            (place / bound).write_text(str(limit))
            return place
        except OSError:
            with contextlib.suppress(OSError):
                place.rmdir()
    return None


def join(place: str | Path) -> None:
    """Put this process into a group; what it held before is not counted there."""
    (Path(place) / "cgroup.procs").write_text(str(os.getpid()))


def most(place: str | Path) -> int | None:
    """The most bytes that a group held, cache included; None where the system does not keep it."""
    for _, _, peak in _FORMS:
        with contextlib.suppress(OSError, ValueError):
            return int((Path(place) / peak).read_text())
    return None
