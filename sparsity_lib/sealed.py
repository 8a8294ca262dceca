"""Safetensors files that hold a checksum of their own content: written whole or not at all, and refused if a bit has changed.

The format itself notices a header that is broken, but not a number that is another one. The checksum stands in the file's
metadata and covers names, dtypes, shapes and bytes of the tensors, and all other metadata. It guards against damage, not
against somebody who writes a file on purpose: they would write its checksum too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: The name of the checksum in the metadata.
SEAL = "sha256"
#: Stands for no tensors at all, which some readers of the format refuse.
_NOTHING = "none"


def checksum(tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    """SHA-256 over tensors and metadata, in hexadecimal; the order in which they are given does not matter."""
    digest = hashlib.sha256(json.dumps(sorted(meta.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> None:
    """Write one file; one that is there already is replaced whole or not at all, and two writers do not meet.

    Raises OSError or SafetensorError where it cannot be written.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()} or {_NOTHING: torch.zeros(1)}
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        save_file(plain, partial, metadata={**meta, SEAL: checksum(plain, meta)})
        with open(partial, "rb+") as written:
            _sort(written)
            os.fsync(written.fileno())  # a crash after the rename must not leave an empty file under the good name
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _sort(file: BinaryIO) -> None:
    """Put the header's metadata in order: the writer takes them as a hash table gives them, another way in each process."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) <= size:  # else another writer spells JSON otherwise, and the file is right as it is
        file.seek(8)
        file.write(text.ljust(size))


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `write` wrote with `format` = kind in its metadata.

    Raises
    ------
    ValueError
        Saying what is wrong: no file, truncated, of another format, without a checksum or with a wrong one.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != kind:
                raise ValueError(f"it has format {meta.get('format')!r}, expected {kind!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None
    sealed = meta.pop(SEAL, None)
    if sealed != checksum(tensors, meta):
        raise ValueError("its content is not what its checksum says: the file was damaged" if sealed else "it has no checksum")
    tensors.pop(_NOTHING, None)
    return tensors, meta
