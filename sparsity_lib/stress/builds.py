"""The whole book built twice, one build after another and both at once: pages, tables and figures, byte for byte."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sparsity_lib import project
from sparsity_lib.stress.base import Attempts, NotHereError, trial

#: Of the tool, not of the book: when it was built, and from which settings.
_TOOLS = (".buildinfo", "objects.inv")


@trial("bits", "this book, its notebooks executed, built twice from nothing",
       "the same pages, figures and numbers, byte for byte")
def fresh_builds(t: Attempts) -> None:
    root = project.root()
    command = Path(sys.executable).with_name("jupyter-book")
    if t.size == "quick":
        raise NotHereError("two builds of the book take a quarter of an hour: at full size only")
    if not (command.exists() and (root / "_config.yml").exists() and (root / "book" / "_static" / "mathjax").exists()):
        raise NotHereError("it takes a checkout in which `make book-smoke` has run")
    found = [built(t, command, root, t.folder / name) for name in ("one", "two")]
    if all(found):
        for name, (one, other) in compared(*found).items():
            t.check(f"{name} {'differs' if one and other else 'is in one of them only'}", one == other)


@trial("interruptions", "two `make book-smoke` at once in one checkout, and one afterwards",
       "all of them end well, with the same pages, byte for byte")
def two_builds(t: Attempts) -> None:
    root = project.root()
    if t.size == "quick":
        raise NotHereError("three builds of the pages take some minutes: at full size only")
    if not (root / "Makefile").exists() or shutil.which("make") is None:
        raise NotHereError("it takes a checkout, and make")
    # a make around this one would hand on its own settings
    own = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "INSIDE")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    command = ["make", "-C", root, f"VENV={Path(sys.prefix)}", "book-smoke"]

    if subprocess.run(["make", "-q", *command[1:-1], "env"], env=environment, capture_output=True).returncode:
        raise NotHereError("it takes the environment that `make env` has made: another one would be changed")

    def start(log: Path) -> subprocess.Popen:
        with open(log, "w") as said:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)

    found = []
    for count in (2, 1):
        logs = [t.folder / f"{count}-{number}.log" for number in range(count)]
        for process, log in zip([start(log) for log in logs], logs, strict=True):
            code = process.wait()
            t.check(f"a build of {count} at once failed: {log.read_text()[-500:]}", code == 0)
        found.append(checksums(root / "_build" / "smoke" / "_build" / "html"))
    for name, (one, other) in compared(*found).items():
        t.check(f"{name} differs", one == other)


def built(t: Attempts, command: Path, root: Path, folder: Path) -> dict[str, str]:
    """Build into a folder; its files, by name, and their checksums. None of them where the build fails."""
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "SPARSITY_RECORDS": str(folder / "records"), "PATH": path}
    t.note(f"build {folder.name}")
    done = subprocess.run(
        [command, "build", ".", "--path-output", folder, "-W", "-n", "--keep-going", "--all"], cwd=root, env=environment,
        capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        t.lose(f"build {folder.name} failed: {(done.stdout + done.stderr)[-800:]}")
        return {}
    return {**checksums(folder / "_build" / "html"), **checksums(folder / "records", "record of ")}


def checksums(folder: Path, prefix: str = "") -> dict[str, str]:
    """sha256 of every file below a folder, by its name there."""
    return {prefix + path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _TOOLS}


def compared(one: dict[str, str], other: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """By file, its checksum in both."""
    return {name: (one.get(name), other.get(name)) for name in sorted(one.keys() | other.keys())}
