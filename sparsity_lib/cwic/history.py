"""What a CWIC run says about each of its steps, kept beside the checkpoints so that a resumed run has all of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparsity_lib import project
from sparsity_lib.errors import SparsityError

#: Name of the log in the folder of checkpoints: one JSON object a line and a step.
LOG = "history.jsonl"
#: The way out where a step's record cannot be written.
AGAIN = "free some space or let it be written; the same call goes on from the last checkpoint"


@dataclass(frozen=True)
class StepRecord:
    """One step. loss is all that was minimised; kl is half forward plus half reverse, nats a token.

    ratio and head_ratio are base cost / cost of the step's batch, target what the ratio should be.
    """

    step: int
    loss: float
    kl: float
    forward_kl: float
    reverse_kl: float
    mse: float | None
    ratio: float
    target: float
    head_ratio: float | None
    tokens: int
    tokens_per_second: float


class History:
    """Collects the pieces of each step, writes its record and hands it to a callback (in the first process)."""

    def __init__(self, folder: Path | None, callback: Callable[[StepRecord, nn.Module], None] | None) -> None:
        self.path = None if folder is None else folder / LOG
        self.callback = callback
        self.records: list[StepRecord] = []
        self._pieces: list[dict[str, Tensor | float | None]] = []
        self._stale = False
        self._last = time.monotonic()

    def resume(self, step: int) -> None:
        """Take over the records of steps before `step`, and forget those after: they are done again.

        The file itself is put right with the first piece, when no other run can be training into the folder.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise SparsityError(f"cannot read {self.path}: {error.strerror or error}. Fix: let it be read, or remove it; the "
                                "records of steps before the last checkpoint are then lost.") from error
        self.records = [r for r in map(_parsed, lines) if r is not None and r.step < step]
        self._stale = True

    def piece(self, **values: Tensor | float | None) -> None:
        """What one accumulated piece of the current step gave."""
        if self._stale and _first():
            project.write_atomic(self.path, "".join(map(_line, self.records)))
        self._stale = False
        self._pieces.append(values)

    def done(self, module: nn.Module, step: int) -> None:
        """The step's update is made: write its record. Raises SparsityError where that cannot be written."""
        pieces, self._pieces = self._pieces, []
        mean = _mean(pieces)
        now = time.monotonic()
        tokens = round(mean.pop("tokens") * len(pieces) * _processes())
        record = StepRecord(step=step, tokens=tokens, tokens_per_second=tokens / max(now - self._last, 1e-9), **mean)
        self._last = now
        self.records.append(record)
        if _first():
            if self.path is not None:
                with project.writing(self.path, AGAIN):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(_line(record))
            if self.callback is not None:
                self.callback(record, module)

    def drop(self) -> None:
        """Forget the pieces of a step that was not completed."""
        self._pieces = []


def _mean(pieces: list[dict[str, Tensor | float | None]]) -> dict[str, float | None]:
    """Each value's mean over the pieces of all processes; None where it was None."""
    names = [name for name, value in pieces[0].items() if value is not None]
    device = next((v.device for v in pieces[0].values() if isinstance(v, Tensor)), None)
    table = torch.tensor([[float(piece[name]) for name in names] for piece in pieces], dtype=torch.float64, device=device).mean(0)
    if _processes() > 1:
        dist.all_reduce(table)
        table /= _processes()
    return {**dict.fromkeys(pieces[0]), **dict(zip(names, table.tolist(), strict=True))}


def _line(record: StepRecord) -> str:
    return json.dumps(asdict(record)) + "\n"


def _parsed(line: str) -> StepRecord | None:
    try:
        return StepRecord(**json.loads(line))
    except (ValueError, TypeError, RecursionError):  # the line that a killed process, or one with a full disk, was writing
        return None


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _first() -> bool:
    return _processes() == 1 or dist.get_rank() == 0
