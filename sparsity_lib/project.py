"""Where the book's own files are, and how they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from .errors import SparsityError

#: Overrides the search for the checkout (a folder).
SWITCH = "SPARSITY_PROJECT"
#: A folder that holds all of these is a checkout of the book.
MARKS = ("_toc.yml", "pyproject.toml", "notebooks")
#: What decides the numbers of a run.
CODE = ("sparsity_lib/**/*", "kernels/**/*", "requirements.lock")
#: The way around a disk without room for temporary files.
ELSEWHERE = "free some space there or set TMPDIR=/folder/on/another/disk"


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


@contextlib.contextmanager
def writing(what: object, fix: str = "free some space or choose a folder that can be written") -> Iterator[None]:
    """Turn what the system raises for a write inside (no space, no permission) into a SparsityError that names `what`."""
    try:
        yield
    except SparsityError:
        raise
    except OSError as error:
        raise SparsityError(f"cannot write {what}: {error.strerror or error}. Fix: {fix}.") from error


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder, gone afterwards; raises SparsityError where none can be made."""
    with writing("temporary files", ELSEWHERE):
        parent = tempfile.gettempdir()
    with writing(f"temporary files in {parent}", ELSEWHERE):
        place = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        yield Path(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, a crash or a full disk never meets half of it.

    Raises SparsityError where the folder cannot be written (no space, no permission); an older file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    with writing(f"{path.name} in {path.parent}"):
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
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def write_folder(path: Path, files: Mapping[str, str], whole: Callable[[Path], bool] = Path.is_dir) -> None:
    """Write a folder (relative name -> text) that is there whole or not at all.

    What is there already stays if it is `whole`. Else it gives way once all is written: a reader finds the old one, for a moment
    none, then the new one. Raises SparsityError where it cannot be written.
    """
    place: str | None = None
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            place = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
            new = Path(place) / "new"
            new.mkdir()
            for name, text in files.items():
                write_atomic(new / name, text)
            if os.path.lexists(path) and not whole(path):
                with contextlib.suppress(FileNotFoundError):  # another process has moved it
                    os.rename(path, Path(place) / "old")
            os.rename(new, path)
        except OSError:
            if not whole(path):  # else another process was first
                raise
        finally:
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)


def refuse_unwritable(folder: Path) -> None:
    """Raise SparsityError where a folder, which need not be there yet, is none that could be written: before hours of work."""
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "you may not write there" if there.is_dir() else "it is no folder"
        raise SparsityError(f"cannot write in {there}: {why}. Fix: let it be written, or work in a checkout that can be.")


@contextlib.contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Hold the lock file `lock` against other processes; where one of them does, raise SparsityError that `what` is being made.

    The lock ends with its process, however that ends; the empty file stays.
    """
    import filelock

    with writing(f"in {lock.parent}"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(lock, timeout=0)
        try:
            held.acquire()
        except filelock.Timeout:
            raise SparsityError(f"{what} is being made by another process. Fix: wait for it.") from None
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
