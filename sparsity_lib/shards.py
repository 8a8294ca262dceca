"""Safetensors files on disk: which tensor lies in which file, checked before any number is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sparsity_lib.errors import AssetError, refuse

#: One file with all tensors, or the list of several; transformers' names, and its order.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Bytes of an entry by what a header calls its type; what is stored otherwise is no weight that can be used as it is.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Entry(NamedTuple):
    """What a file's header says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOATS.get(self.dtype, 0)


class Shards:
    """The tensors of one checkpoint folder.

        shards = Shards(folder)                                  # reads the index and every header, no weights
        with shards.opened(["lm_head.weight"]) as found:
            head = found["lm_head.weight"][...]                  # mapped from the file where the system can

    Parameters
    ----------
    folder
        Holds `model.safetensors`, or the files that `model.safetensors.index.json` lists.

    Raises
    ------
    AssetError
        If there is neither (weights in pickle files are not read), a file is missing or cut off, or does not hold what the
        index says.
    SparsityError
        If the index names anything but a .safetensors file that lies beside it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        listed = _listed(self.folder)
        #: name -> where and what it is.
        self.entries: dict[str, Entry] = {}
        self._states: dict[str, tuple[int, int]] = {}
        for file in sorted(set(listed.values())) or [SINGLE]:
            self._states[file] = self._state(file)
            self.entries |= {name: entry for name, entry in self._header(file).items() if listed.get(name, file) == file}
        for name, file in listed.items():
            if name not in self.entries:
                raise AssetError(f"{INDEX} says that {name!r} is in {file}, but that file does not hold it. "
                                 f"Fix: get index and files of {self.folder} again, from one place.")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of floating point."""
        return sum(entry.nbytes for entry in self.entries.values())

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """name -> a slice of the file, of which `[...]` is the tensor; nothing is read before.

        Raises
        ------
        AssetError
            If a file has changed since the checkpoint was opened: mapped numbers would change with it.
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.entries[name].file, []).append(name)
        with ExitStack() as stack:
            found = {}
            for file, inside in wanted.items():
                if self._state(file) != self._states[file]:
                    raise AssetError(f"{self.folder / file} has changed since it was opened. Fix: load the model anew.")
                handle = stack.enter_context(self._open(file))
                found |= {name: handle.get_slice(name) for name in inside}
            yield found

    def _header(self, file: str) -> dict[str, Entry]:
        with self._open(file) as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}
            return {name: Entry(file, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}

    def _open(self, file: str):
        try:
            return safe_open(self.folder / file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise AssetError(f"{self.folder / file} is no whole safetensors file ({error}): it is damaged or was cut off. "
                             "Fix: get it again.") from error

    def _state(self, file: str) -> tuple[int, int]:
        try:
            found = os.stat(self.folder / file)
        except OSError as error:
            raise AssetError(f"{self.folder / file} is missing or cannot be read ({error.strerror}). "
                             "Fix: get all files of the checkpoint.") from error
        return found.st_size, found.st_mtime_ns


def check_files(folder: str | Path) -> None:
    """Refuse a folder whose weights' files, or those that its index names, are anything but files that lie in it.

    transformers opens whatever an index names: /dev/zero, until memory is full, or a file somewhere else.

    Raises
    ------
    AssetError, SparsityError
        As `Shards` does for an index; and for a file that is none, a device, say. No weights at all are not refused here.
    """
    folder = Path(folder)
    listed = _listed(folder) if (folder / INDEX).exists() and not (folder / SINGLE).is_file() else {}
    for file in sorted({SINGLE, *listed.values()}):
        if (folder / file).exists() and not (folder / file).is_file():
            raise AssetError(f"{folder / file} is no regular file. Fix: get all files of the checkpoint.")


def _listed(folder: Path) -> dict[str, str]:
    """name -> file as the index has it; nothing where all is in one file."""
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        held = f"weights as pickle ({pickled[0]}), which can run code and is not read" if pickled else "no weights"
        raise AssetError(f"{folder} holds {held}: expected {SINGLE} or {INDEX}. "
                         "Fix: convert them with save_pretrained where you trust them, or get the safetensors files.")
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(listed, dict) or not listed:
            raise TypeError("its weight_map is no object, or empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{folder / INDEX} is no index of weights ({error}). Fix: get it again.") from error
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise refuse(f"file of {name!r} in {INDEX}", file, "the name of a .safetensors file beside it",
                         "get the index again, and pickle files as safetensors")
    return listed
