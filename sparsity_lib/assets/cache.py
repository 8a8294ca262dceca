"""The cache folder: where it is, how two processes share it, and how nothing half-written ever becomes visible.

Every writer works in a `*.partial` neighbour under a lock and renames at the end. Since the lock is held while one
works, a `*.partial` found by the next holder belongs to a dead run and is removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from sparsity_lib.errors import AssetError
from sparsity_lib.progress import bar

#: Environment variable that moves the cache elsewhere.
SWITCH = "SPARSITY_CACHE"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_CHUNK = 1 << 22


def cache_folder() -> Path:
    """The folder that holds everything fetched or converted: `$SPARSITY_CACHE`, else the user's cache folder."""
    chosen = os.environ.get(SWITCH, "").strip()
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("sparsity-lib")


@contextmanager
def guarded(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn a full disk or a read-only folder, while `needed` bytes are written to `folder`, into an AssetError."""
    try:
        yield
    except AssetError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise full(folder, needed) from error
        if error.errno in _FORBIDDEN:
            raise AssetError(
                f"The cache folder {folder} cannot be written ({error.strerror}). "
                f"Fix: set {SWITCH}=/a/folder/of/your/own, or let its owner run `python -m sparsity_lib.assets fetch`."
            ) from error
        raise


def full(folder: Path, needed: int) -> AssetError:
    """Build the error for a disk without room."""
    return AssetError(
        f"No space left on the disk of {folder}: about {needed / 1e6:,.0f} MB are needed there. "
        f"Fix: free some, or set {SWITCH}=/folder/on/another/disk."
    )


def ensure_room(folder: Path, needed: int) -> None:
    """Refuse to start a write of `needed` bytes that the disk of `folder` cannot hold."""
    if shutil.disk_usage(folder).free < needed:
        raise full(folder, needed)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on `path` (a file or folder that may not exist yet) against threads and other processes."""
    with guarded(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            print(f"waiting for another process that prepares {path.name} ...", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def partial(path: Path) -> Path:
    """The temporary neighbour of `path`, clean of what a dead run left; call it with the lock of `path` held."""
    temporary = path.parent / f".{path.name}.partial"
    remove(temporary)
    return temporary


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Make `temporary` visible as `path`, durable and in one step; a `path` that is there is replaced."""
    files = [temporary] if temporary.is_file() else [entry for entry in temporary.rglob("*") if entry.is_file()]
    for entry in files:
        with open(entry, "rb+") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():  # a folder cannot be replaced by rename while it has entries
        stale = path.parent / f".{path.name}.stale.partial"
        remove(stale)
        os.replace(path, stale)
        os.replace(temporary, path)
        remove(stale)
    else:
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with guarded(path.parent, len(text)), locked(path):
        temporary = partial(path)
        try:
            temporary.write_text(text, encoding="utf-8")
            publish(temporary, path)
        finally:
            remove(temporary)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, with a progress bar for big ones."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as handle, bar(size, f"checking {path.name}", "B", unit_scale=True) as progress:
        while block := handle.read(_CHUNK):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()
