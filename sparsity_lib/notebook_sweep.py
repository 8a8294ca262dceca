"""A chapter at every combination of some parameters' values, each run once: `make sweep`.

    python -m sparsity_lib.notebooks sweep claws density=0.3,0.5 model=smollm2-135m-instruct,gemma3-270m

Where the runs take place, the environment says (see `sweep`). Each ends in a folder of its own, `runs/sweeps/CHAPTER/KEY/`:
the executed notebook, its records (every number it reported, by name) and `sweep.json`, which says what was run. The key is made
of the chapter's code, its parameters, the library's and the kept results' content, and the content of a local model's folder;
so a folder that is there is what would be computed, and is not computed again. A model on a hub is known by its name alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import nbformat

from . import notebooks, parameters, project
from . import sweep as sweeps
from .errors import SparsityError
from .progress import bar

#: Hexadecimal digits of a key.
KEY = 16


def sweep(name: str, pairs: list[str]) -> list[Path]:
    """Run what is missing, print a line for each combination, and return their folders, in order.

    `pairs` are 'parameter=value,value' texts, refused before anything runs where a value is not allowed. Raises SparsityError
    as `sweep.run` does, and where a cell fails, naming it and the parameters.
    """
    known = notebooks.parameters_of(name)
    source = notebooks.find(name).read_text()
    shared = {
        "chapter": name, "source": _code_of(source), "code": project.code_hash(),
        "content": project.code_hash(also=("results/**/*.json",))}
    folders: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}
    for given in parameters.read_combinations(pairs, known):
        everything = {key: given.get(key, parameter.default) for key, parameter in known.items()}
        facts = {**shared, "parameters": everything, "folders": _local(everything)}
        key = hashlib.sha256(sweeps.canonical(facts, f"parameters of {name}").encode()).hexdigest()[:KEY]
        folders[project.root() / "runs" / "sweeps" / name / key] = given, facts
    missing = [folder for folder in folders if not folder.is_dir()]
    tasks = [sweeps.Task(_title(name, folders[folder][0]), partial(execute, name, source, folders[folder][0], shared["code"]))
             for folder in missing]
    with bar(total=len(folders), desc=name, unit="run") as progress:
        progress.update(len(folders) - len(missing))

        def keep(index: int, outcome: sweeps.Outcome) -> None:
            facts = {**folders[missing[index]][1], "seconds": round(outcome.seconds, 1)}
            project.write_folder(missing[index], {
                f"{name}.ipynb": outcome.value["notebook"], "sweep.json": json.dumps(facts, indent=1, sort_keys=True) + "\n",
                **{f"records/{file}": text for file, text in outcome.value["records"].items()}})
            progress.update(1)

        sweeps.run(tasks, keep, code=shared["code"])
    for folder, (given, _) in folders.items():
        print(f"{folder.relative_to(project.root())}  {_title(name, given)}")
    return list(folders)


def execute(name: str, source: str, given: dict[str, Any], code: str) -> dict[str, Any]:
    """In a worker: run a chapter, whose file reads `source`, and return its notebook and records as texts.

    Raises SparsityError for a cell that fails, and where the library is no longer `code`, under which the run would be filed.
    """
    with tempfile.TemporaryDirectory(prefix="sparsity-sweep-") as place:
        folder = Path(place)
        chapter, made, records = folder / f"{name}.ipynb", folder / "executed.ipynb", folder / "records"
        chapter.write_text(source)
        try:
            notebooks.papermill_into(made, chapter, given, records, progress=False)
        except SparsityError as error:
            raise SparsityError(f"{_title(name, given)}: {error}") from None
        if project.code_hash() != code:
            raise SparsityError(f"{_title(name, given)}: the library was changed while it ran. Fix: the same command, again.")
        found = {file.name: file.read_text() for file in sorted(records.glob("*.json"))}
        return {"notebook": made.read_text(), "records": found}


def _title(name: str, given: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in given.items())])


def _code_of(source: str) -> str:
    """SHA-256 of a notebook's code cells: outputs and prose decide nothing."""
    cells = [cell.source for cell in nbformat.reads(source, as_version=4).cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _local(everything: dict[str, Any]) -> dict[str, str]:
    """Folder -> SHA-256 of what is in it, for each that a parameter names."""
    values = [entry for value in everything.values() for entry in (value if isinstance(value, list) else [value])]
    named = {value: project.root() / "notebooks" / value for value in values if isinstance(value, str) and value}
    return {value: project.tree_hash(folder, folder.rglob("*")) for value, folder in named.items() if os.path.isdir(folder)}
