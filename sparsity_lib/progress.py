"""One progress bar for the whole project: in terminals and live notebooks, never in the rendered book."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

#: Set to "0" by the book build, so that committed notebook outputs hold no bars.
SWITCH = "SPARSITY_PROGRESS"
#: Work that ends sooner than this shows no bar at all (seconds).
DELAY = 2.0


def unshare() -> None:
    """Give a forked process a lock of its own for its bars.

    tqdm's is shared by a process and what it forks: one that is killed while it draws would leave it taken, for good, for all.
    """
    tqdm.set_lock(threading.RLock())


def shown() -> bool:
    """Whether progress bars are drawn in this process."""
    return os.environ.get(SWITCH, "1") != "0"


def bar(total: int | None = None, desc: str = "", unit: str = "it", **options: Any) -> tqdm:
    """A progress bar to update by hand; use as a context manager."""
    return tqdm(
        total=total, desc=desc, unit=unit, disable=not shown(), delay=DELAY, leave=False,
        dynamic_ncols=True, **options,
    )


def track(items: Iterable[T], desc: str = "", total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate over `items` with a progress bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with bar(total=total, desc=desc, unit=unit) as progress:
        for item in items:
            yield item
            progress.update(1)
