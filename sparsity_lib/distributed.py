"""One evaluation shared by several processes, on several GPUs or machines, which torchrun or `accelerate launch` has started.

    torchrun --nproc-per-node 8 evaluate.py

    with sl.distributed() as ranks:
        model, tokenizer = sl.load_model(name, dtype="bfloat16", device=ranks.device)
        found = evaluate(model, plans, ids)         # a share of the text each; all of them get the whole result
        if ranks.first:
            print(found)

Each process holds the whole model. Started without a launcher the same script runs alone.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch

from sparsity_lib import progress
from sparsity_lib.errors import SparsityError

T, R = TypeVar("T"), TypeVar("R")
#: One that dies ends the others at once, by the launcher. Who waits for a slower one has to have patience.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """The processes that work together.

    index, count: this one, from 0, of how many. device: where its model belongs.
    """

    index: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that reports."""
        return self.index == 0

    def share(self, costs: Sequence[float]) -> slice:
        """This one's part of a row of work of the given costs: neighbours, and about as costly as each other one's."""
        until = list(accumulate(costs, initial=0))
        cuts = [bisect_left(until, until[-1] * rank / self.count) for rank in (self.index, self.index + 1)]
        return slice(cuts[0], len(costs) if self.index + 1 == self.count else cuts[1])

    def gather(self, value: Any) -> list[Any]:
        """What each one has, by rank, on all of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def agree(self, what: str, value: object) -> None:
        """Raise SparsityError on all of them unless each has the same (of which the repr is compared)."""
        digests = self.gather(hashlib.sha256(repr(value).encode()).hexdigest())
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise SparsityError(
                f"The processes do not do the same: {what} of rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} "
                "is other than that of rank 0. Fix: give all of them the same, random draws with a seed.")


_current: Ranks | None = None
#: Pieces of work that were shared so far: the processes have to be at the same one.
_shared = 0


@contextmanager
def distributed() -> Iterator[Ranks]:
    """A context in which `evaluate`, `evaluate_pair`, `evaluate_other` and `run_benchmarks` share their work among all processes.

    All have to make the same calls in the same order, and all get the same results. Only the first draws progress bars.

    Raises
    ------
    SparsityError
        If a context is open already.
    """
    global _current
    if _current is not None:
        raise SparsityError("The processes work together already. Fix: one `with distributed()` around all that they share.")
    _current = _ranks()
    bars = os.environ.get(progress.SWITCH)
    try:
        if not _current.first:
            os.environ[progress.SWITCH] = "0"
        yield _current
        _current.gather(None)  # the first keeps the others' connections: it must not be the first to go
        if _current.count > 1:  # after an error, leaving the group could wait for those that are still in it
            atexit.register(_leave)
    finally:
        _current = None
        if bars is None:
            os.environ.pop(progress.SWITCH, None)
        else:
            os.environ[progress.SWITCH] = bars


def _ranks() -> Ranks:
    found = torch.accelerator.current_accelerator(check_available=True)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks(0, 1, found or torch.device("cpu"))
    from accelerate import PartialState

    # Without a GPU, accelerate takes each of torchrun's processes for the only one unless it is told.
    state = PartialState(cpu=found is None, timeout=PATIENCE)
    return Ranks(state.process_index, state.num_processes, state.device)


def _leave() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()


def spread(items: Sequence[T], work: Callable[[Sequence[T]], list[R]], costs: Sequence[float] | None = None,
           same: object = None) -> list[R]:
    """`work(items)`; in a `distributed` context each process does a part of them, and the lists are put one behind the other.

    Where the work of one fails, it raises that error and all others a SparsityError that names it, so that none waits for it.

    Parameters
    ----------
    costs
        Of each item; by default equal.
    same
        What has to be the same in all processes, beside the number of items.
    """
    global _shared
    ranks = _current
    if ranks is None or ranks.count == 1:
        return work(items)
    _shared += 1
    ranks.agree("the work", (_shared, len(items), same))
    own = items[ranks.share([1] * len(items) if costs is None else costs)]
    found, failure = [], None
    try:
        found = work(own) if own else []
    except Exception as error:
        failure = error
    parts = ranks.gather((None if failure is None else f"{type(failure).__name__}: {failure}", found))
    if failure is not None:
        raise failure
    for rank, (said, _) in enumerate(parts):
        if said is not None:
            raise SparsityError(f"The work failed in the process of rank {rank}: {said}. Fix: what it names, there.")
    return [each for _, part in parts for each in part]
