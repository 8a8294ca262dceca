"""A chapter at every combination of some parameters' values, each run once: `make sweep`.

    python -m sparsity_lib.notebooks sweep claws density=0.3,0.5 model=smollm2-135m-instruct,gemma3-270m

Where the runs take place, the environment says (see `sweep`). Each ends in a folder of its own, `runs/sweeps/CHAPTER/KEY/`:
the executed notebook, its records (every number it reported, by name) and `sweep.json`, which says what was run and has a
checksum of each file and of itself. The key is made of the chapter's code, its parameters, the library's and the kept results'
content, and the content of a local model's folder; so a folder that is there and whole is what would be computed, and is not
computed again. One that is damaged is, and gives way once that has succeeded. A model on a hub is known by its name alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import nbformat

from . import notebooks, parameters, project
from . import sweep as sweeps
from .errors import SparsityError, shown
from .progress import bar

#: Hexadecimal digits of a key.
KEY = 16
#: What says what was run, beside the notebook.
ABOUT = "sweep.json"


def sweep(name: str, pairs: list[str]) -> list[Path]:
    """Run what is missing, print a line for each combination, and return their folders, in order.

    `pairs` are 'parameter=value,value' texts, refused before anything runs where a value is not allowed. Raises SparsityError
    as `sweep.run` does, where a cell fails, naming it and the parameters, and where runs/ cannot be written.
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
    missing = []
    for folder, (_, facts) in folders.items():
        damage = _damage(folder, facts)
        if damage:
            print(f"{folder.relative_to(project.root())} is damaged: {damage}. It is run again and replaced.", file=sys.stderr)
        if damage != "":
            missing.append(folder)
    if missing:
        project.refuse_unwritable(missing[0].parent)
    tasks = [sweeps.Task(_title(name, folders[folder][0]), partial(execute, name, source, folders[folder][0], shared["code"]))
             for folder in missing]
    with bar(total=len(folders), desc=name, unit="run") as progress:
        progress.update(len(folders) - len(missing))

        def keep(index: int, outcome: sweeps.Outcome) -> None:
            folder, facts = missing[index], folders[missing[index]][1]
            project.write_folder(folder, _files(name, facts, outcome), whole=lambda path: _damage(path, facts) == "")
            progress.update(1)

        sweeps.run(tasks, keep, code=shared["code"])
    for folder, (given, _) in folders.items():
        print(f"{folder.relative_to(project.root())}  {_title(name, given)}")
    return list(folders)


def read(folder: Path) -> dict[str, Any]:
    """What was run in a combination's folder: chapter, parameters, seconds, and files (name -> SHA-256), which are verified.

    Raises SparsityError, saying which file is missing or is not what was written.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about.pop("sha256", None) != sweeps.seal(about):
            raise SparsityError(f"{ABOUT} is not what was written")
        for file, expected in about["files"].items():
            if _checksum((folder / file).read_bytes()) != expected:
                raise SparsityError(f"{file} is not what was written")
        return about
    except FileNotFoundError as error:
        raise SparsityError(f"{Path(error.filename).relative_to(folder)} is missing") from None
    except SparsityError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SparsityError(f"{ABOUT} or a file that it lists cannot be read: {shown(error)}") from None


def _damage(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the folder of `facts`; nothing where it is whole, None where there is none."""
    if not os.path.lexists(folder):
        return None
    try:
        about = read(folder)
    except SparsityError as error:
        return str(error)
    wanted = json.loads(sweeps.canonical(facts, "what is run"))
    return "" if {key: about.get(key) for key in wanted} == wanted else "it is of another run"


def _files(name: str, facts: Mapping[str, Any], outcome: sweeps.Outcome) -> dict[str, str]:
    """Relative name -> text of all that a combination's folder holds."""
    texts = {f"{name}.ipynb": outcome.value["notebook"],
             **{f"records/{file}": text for file, text in outcome.value["records"].items()}}
    sums = {file: _checksum(text.encode()) for file, text in texts.items()}
    about = json.loads(sweeps.canonical({**facts, "seconds": round(outcome.seconds, 1), "files": sums}, "what was run"))
    return {**texts, ABOUT: json.dumps({**about, "sha256": sweeps.seal(about)}, indent=1, sort_keys=True) + "\n"}


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def execute(name: str, source: str, given: dict[str, Any], code: str) -> dict[str, Any]:
    """In a worker: run a chapter, whose file reads `source`, and return its notebook and records as texts.

    Raises SparsityError for a cell that fails, where temporary files cannot be written, and where the library is no longer
    `code`, under which the run would be filed.
    """
    with project.scratch("sparsity-sweep-") as folder:
        chapter, made, records = folder / f"{name}.ipynb", folder / "executed.ipynb", folder / "records"
        with project.writing(chapter, project.ELSEWHERE):
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
