"""What workers of the sweep's tests compute. Each run of a task leaves a file `N.PID` in a folder, however it ends."""

import os
import signal
import time
from pathlib import Path

#: Longer than any answer that is sent in one piece.
LONG = 300_000


def stub(folder: Path) -> Path:
    """A folder for `sys.path`, with the library's modules and without what its package imports first: that takes seconds, and
    sweeps need none of it."""
    import sparsity_lib

    (folder / "sparsity_lib").mkdir(parents=True)
    (folder / "sparsity_lib" / "__init__.py").write_text(f"__path__ = {list(sparsity_lib.__path__)!r}\n")
    return folder


def _begin(n: int, folder: str) -> Path:
    path = Path(folder) / f"{n}.{os.getpid()}"
    path.write_text("")
    return path


def square(n: int, folder: str) -> dict:
    """A value at once."""
    _begin(n, folder)
    return {"square": n**2, "process": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS"), "long": "x" * LONG}


def held(n: int, folder: str) -> dict:
    """A value as soon as there is a file `go`."""
    _begin(n, folder)
    while not (Path(folder) / "go").exists():
        time.sleep(0.02)
    return square(n, folder)


def dies(n: int, folder: str, times: int) -> dict:
    """A value after the process that computes it has been killed so many times."""
    _begin(n, folder)
    if len(list(Path(folder).glob(f"{n}.*"))) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(n, folder)


def fails(n: int, folder: str) -> dict:
    """No value."""
    _begin(n, folder)
    raise ValueError(f"no value for {n}")


def odd(n: int, folder: str) -> None:
    """An exception that cannot be read from its pickle."""
    class Local(Exception):
        pass

    raise Local(f"odd {n}")


def nan(n: int, folder: str) -> float:
    """What JSON cannot hold."""
    return float("nan")
