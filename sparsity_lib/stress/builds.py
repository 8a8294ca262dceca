"""The whole book built twice, one build after another and both at once: pages, tables and figures, byte for byte."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sparsity_lib import project
from sparsity_lib.stress.base import Attempts, NotHereError, trial

#: Of the tool, not of the book: when it was built, and from which settings.
_TOOLS = (".buildinfo", "objects.inv")
#: Figures of times that are measured while the book is built: the only pictures that may differ.
TIMED = ("fig-roofline", "fig-blocks-scap")


@trial("bits", "this book, its notebooks executed, built twice from nothing",
       f"the same pages, figures and numbers, byte for byte, but for {len(TIMED)} figures of times measured in the build itself")
def fresh_builds(t: Attempts) -> None:
    root = project.root()
    command = Path(sys.executable).with_name("jupyter-book")
    if t.size == "quick":
        raise NotHereError("two builds of the book take a quarter of an hour: at full size only")
    if not (command.exists() and (root / "_config.yml").exists() and (root / "book" / "_static" / "mathjax").exists()):
        raise NotHereError("it takes a checkout in which `make book-smoke` has run")
    found = [built(t, command, root, t.folder / name) for name in ("one", "two")]
    if all(found):
        compare(t, *found)


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
        found.append(contents(root / "_build" / "smoke" / "_build" / "html"))
    compare(t, *found)


def built(t: Attempts, command: Path, root: Path, folder: Path) -> dict[str, bytes]:
    """Build into a folder; its files' `contents`, by name, but for `TIMED`. None of them where the build fails."""
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "SPARSITY_RECORDS": str(folder / "records"), "PATH": path}
    t.note(f"build {folder.name}")
    done = subprocess.run(
        [command, "build", ".", "--path-output", folder, "-W", "-n", "--keep-going", "--all"], cwd=root, env=environment,
        capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        t.lose(f"build {folder.name} failed: {(done.stdout + done.stderr)[-800:]}")
        return {}
    return {**without(TIMED, contents(folder / "_build" / "html")), **contents(folder / "records", "record of ")}


def contents(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Every file below a folder by its name there: pages and records as they are, of all else the sha256."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _TOOLS:
            content = path.read_bytes()
            text = path.suffix in (".html", ".json", ".js")
            found[prefix + path.relative_to(folder).as_posix()] = content if text else hashlib.sha256(content).digest()
    return found


def without(figures: tuple[str, ...], files: dict[str, bytes]) -> dict[str, bytes]:
    """Files of a book without the pictures of these figures, and without their names, which are checksums, in the pages.

    Raises
    ------
    ValueError
        If no page has such a figure.
    """
    for figure in figures:
        shown = re.compile(rb'<figure [^>]*id="%s">(?:(?!</figure>).)*?_images/([0-9a-f]{64})\.png' % figure.encode(), re.DOTALL)
        names = {found[1] for content in files.values() if (found := shown.search(content))}
        if not names:
            raise ValueError(f"no page shows {figure}")
        for name in names:
            files = {file: content.replace(name, figure.encode()) for file, content in files.items() if name.decode() not in file}
    return files


def compare(t: Attempts, one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """Count the files of two builds, each as an attempt: the same, or in words how it differs, where, and what each has there."""
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            t.lose(f"{name} is in one of them only")
        elif a != b:
            at = len(os.path.commonprefix([a, b]))
            t.lose(f"{name} differs at byte {at}: {a[max(0, at - 80):at + 80]!r} and {b[max(0, at - 80):at + 80]!r}")
        else:
            t.check(name, True)
