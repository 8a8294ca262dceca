"""Where the book's own files are, and how they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .errors import SparsityError

#: Overrides the search for the checkout (a folder).
SWITCH = "SPARSITY_PROJECT"
#: A folder that holds all of these is a checkout of the book.
MARKS = ("_toc.yml", "pyproject.toml", "notebooks")
#: What decides the numbers of a run.
CODE = ("sparsity_lib/**/*", "kernels/**/*", "requirements.lock")


def root() -> Path:
    """The checkout of the book: `SPARSITY_PROJECT`, else around the current folder, else around this package.

    Raises SparsityError where the library was installed without the book.
    """
    chosen = os.environ.get(SWITCH)
    if chosen:
        starts: Iterable[Path] = [Path(chosen)]
    else:
        here = Path.cwd()
        starts = [here, *here.parents, Path(__file__).resolve().parents[1]]
    for folder in starts:
        if all((folder / mark).exists() for mark in MARKS):
            return folder.resolve()
    where = f"{SWITCH}={chosen}" if chosen else "neither the current folder nor one above it"
    raise SparsityError(
        f"this needs a checkout of the book, and {where} is not one (no {', '.join(MARKS)} there). "
        f"Fix: run it inside the checkout, or set {SWITCH} to its folder."
    )


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, a crash or a full disk never meets half of it.

    Raises SparsityError where the folder cannot be written (no space, no permission); an older file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise SparsityError(
            f"cannot write {path.name} in {path.parent}: {error.strerror or error}. "
            "Fix: free some space or choose a folder that can be written."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_folder(path: Path, files: Mapping[str, str]) -> None:
    """Write a folder (relative name -> text) that is there whole or not at all; where it is already, it stays as it is.

    Raises SparsityError where it cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        for name, text in files.items():
            write_atomic(Path(temporary) / name, text)
        os.chmod(temporary, 0o755)
        os.rename(temporary, path)
        temporary = None
    except OSError as error:
        if path.is_dir():
            return  # another process was first
        raise SparsityError(
            f"cannot write {path}: {error.strerror or error}. Fix: free some space or choose a folder that can be written."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Hold the lock file `lock` against other processes; where one of them does, raise SparsityError that `what` is being made.

    The lock ends with its process, however that ends; the empty file stays.
    """
    import filelock

    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(lock, timeout=0)
        held.acquire()
    except filelock.Timeout:
        raise SparsityError(f"{what} is being made by another process. Fix: wait for it.") from None
    except OSError as error:
        raise SparsityError(f"cannot write in {lock.parent}: {error.strerror or error}. "
                            "Fix: free some space or choose a folder that can be written.") from error
    try:
        yield
    finally:
        held.release()


def code_hash(folder: Path | None = None, also: Iterable[str] = ()) -> str:
    """SHA-256 over the names and contents of everything in `CODE` (and `also`, patterns): it changes whenever
    results may."""
    folder = folder or root()
    files = {file for pattern in (*CODE, *also) for file in folder.glob(pattern)}
    return tree_hash(folder, (file for file in files if file.suffix not in {".pyc", ".so", ".o"}))


def tree_hash(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of some files below a folder; folders and hidden files are left out."""
    digest = hashlib.sha256()
    for file in sorted(files):
        relative = file.relative_to(folder)
        if any(part == "__pycache__" or part.startswith(".") for part in relative.parts) or not file.is_file():
            continue
        with open(file, "rb") as content:
            digest.update(f"{relative.as_posix()}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
