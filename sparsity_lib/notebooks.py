"""Run a chapter with other parameters, refresh the committed outputs, keep the book's cache honest.

    python -m sparsity_lib.notebooks run claws model=gemma3-270m density=0.3
    python -m sparsity_lib.notebooks sweep claws model=smollm2-135m-instruct,gemma3-270m density=0.3,0.5
    python -m sparsity_lib.notebooks refresh claws
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from . import parameters, project
from .errors import SparsityError, command_line, unknown
from .errors import shown as cut
from .progress import SWITCH as PROGRESS
from .progress import shown, track
from .records import SWITCH as RECORDS

#: No live cell may take longer (seconds): a chapter has three minutes in all on two cores.
CELL_TIMEOUT = 1800
CACHE, KEY = "_build/.jupyter_cache", "_build/.jupyter_cache.key"


def names() -> list[str]:
    """The chapters that exist, in alphabetical order."""
    return sorted(path.stem for path in (project.root() / "notebooks").glob("*.ipynb"))


def find(name: str) -> Path:
    """The file of a chapter; raises SparsityError with the nearest match for an unknown one."""
    known = names()
    if name not in known:
        raise unknown("notebook", name, known)
    return project.root() / "notebooks" / f"{name}.ipynb"


def read(file: Path) -> nbformat.NotebookNode:
    """A chapter's notebook; raises SparsityError where the file is damaged or cannot be read."""
    try:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        return notebook
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, nbformat.ValidationError) as error:
        raise SparsityError(f"{file} is no notebook that can be read ({cut(str(error))}). Fix: git checkout it.") from None


def parameters_of(name: str) -> dict[str, parameters.Parameter]:
    """What a chapter lets its reader change (empty where it has no cell tagged `parameters`)."""
    notebook = read(find(name))
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) > 1:
        raise SparsityError(f"{name}.ipynb has {len(tagged)} cells tagged 'parameters', and may have one.")
    return parameters.parse_cell(tagged[0].source, f"{name}.ipynb, parameters") if tagged else {}


def run(name: str, pairs: list[str]) -> Path:
    """Run a chapter with changed parameters into `runs/`, through papermill.

    `pairs` are 'parameter=value' texts, refused before anything runs where unknown, of the wrong type or
    out of range. The notebook gets its final name only when every cell has succeeded; until then (and after
    a failure or Ctrl-C) it is `runs/*.partial.ipynb`, and its numbers are kept with it or not at all. Returns the path of the
    finished notebook.
    """
    known = parameters_of(name)
    given = parameters.read_assignments(pairs, known)
    everything = {key: given.get(key, parameter.default) for key, parameter in known.items()}
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:8]
    runs = project.root() / "runs"
    final, partial = runs / f"{name}-{digest}.ipynb", runs / f"{name}-{digest}.partial.ipynb"
    with project.only_one(runs / f"{name}-{digest}.lock", final.name), project.scratch("sparsity-records-") as records:
        papermill_into(partial, find(name), given, records, left=f"The cells up to there are in runs/{partial.name}.")
        _keep(records, runs / "records" / f"{name}-{digest}")
        with project.writing(final):
            os.replace(partial, final)
    return final


def papermill_into(target: Path, source: Path, given: dict[str, Any], records: Path, left: str = "", progress: bool | None = None,
                   ) -> None:
    """Execute a notebook with these parameters into `target`, in the chapters' folder, its numbers into `records`.

    Raises SparsityError with the failing cell's error, and `left`, which says what remains; and where it cannot be written.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    bar = shown() if progress is None else progress  # the terminal's; inside the notebook bars are off, its outputs are kept
    with _environment({PROGRESS: "0", RECORDS: str(records)}):
        try:
            papermill.execute_notebook(
                str(source), str(target), parameters=given, kernel_name="python3", language="python",
                cwd=str(project.root() / "notebooks"), progress_bar=bar, execution_timeout=CELL_TIMEOUT,
            )
        except papermill.PapermillExecutionError as error:
            said = f"{source.name} failed in cell {error.cell_index}: {error.ename}: {error.evalue}"
            raise SparsityError(f"{said}\n{left}".rstrip()) from None
        except (CellTimeoutError, DeadKernelError) as error:
            raise SparsityError(f"{source.name} failed: {error}\n{left}".rstrip()) from None
        except OSError as error:
            raise _unwritten(source, target, error) from error


def _unwritten(source: Path, target: Path, error: OSError) -> SparsityError:
    """Build the error for a run that the system refused something: the notebook, or what a kernel needs beside it."""
    return SparsityError(f"{source.name} cannot be run into {target}: {error}. Fix: free some space, and let that folder be "
                         "written; for a temporary one, set TMPDIR=/folder/on/another/disk.")


def _keep(records: Path, folder: Path) -> None:
    """Copy what a finished run recorded to where it stays."""
    for record in sorted(records.glob("*.json")):
        project.write_atomic(folder / record.name, record.read_text())


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def refresh(chosen: list[str]) -> list[Path]:
    """Execute chapters and commit their outputs to the files, each only if all of its cells succeed.

    The one writer of committed outputs: no timestamps, no bars, no paths of this machine, so that a second
    refresh changes nothing. The numbers go to `notebooks/records/NAME.json`. Raises SparsityError with the
    failing cell's error, and leaves that chapter as it was.
    """
    files = [find(name) for name in chosen or names()]
    for file in track(files, desc="notebooks", unit="notebook"):
        with project.scratch("sparsity-records-") as records:
            notebook = execute(file, records)
            refuse_paths(notebook, file.name)
            _keep(records, file.parent / "records")
            project.write_atomic(file, nbformat.writes(notebook) + "\n")
    return files


def execute(file: Path, records: Path) -> nbformat.NotebookNode:
    """A copy of a notebook, executed in a fresh kernel and cleaned; raises SparsityError on a failing cell, and where no kernel
    can be started."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = read(file)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(file.parent)}},
    )
    environment = {**os.environ, PROGRESS: "0", RECORDS: str(records)}
    try:
        client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise SparsityError(f"{file.name} failed and was left as it was.\n{error}") from None
    except OSError as error:
        raise _unwritten(file, file, error) from error
    return _clean(notebook)


def _clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what differs between two equal runs: versions, timings, editor state."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    })
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in ("tags", "mystnb") if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
    nbformat.validate(notebook)
    return notebook


def refuse_paths(notebook: nbformat.NotebookNode, name: str) -> None:
    """Raise SparsityError where an output holds a path of this machine: it would be published."""
    folders = {str(project.root()), str(Path.home()), sys.prefix, tempfile.gettempdir()}
    folders = {folder.rstrip("/") + "/" for folder in folders if folder not in {"", "/"}} | {str(project.root())}
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            text = json.dumps({**output, "data": _texts(output.get("data", {}))}, ensure_ascii=False)
            for folder in sorted(folders):
                if folder in text:
                    at = text.index(folder)
                    raise SparsityError(
                        f"{name}, cell {index}: an output holds a path of this machine: "
                        f"...{text[max(0, at - 40): at + len(folder) + 40]}... Fix: do not print it."
                    )


def _texts(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if not key.rpartition("/")[0].endswith("image")}


def prune_cache() -> bool:
    """Drop the executed notebooks that the book build keeps, where library, kernels, results or lock changed.

    The build's own cache knows a notebook's code only. Returns whether anything was dropped.
    """
    folder = project.root()
    key, stamp = project.code_hash(folder, also=("results/**/*.json",)), folder / KEY
    if stamp.exists() and stamp.read_text(errors="replace").strip() == key:
        return False
    stale = (folder / CACHE).exists()
    with project.writing(folder / CACHE, "let it be written or remove it: it is outdated"):
        stamp.unlink(missing_ok=True)
        if stale:
            shutil.rmtree(folder / CACHE)
    project.write_atomic(stamp, key + "\n")
    return stale


def _describe(name: str) -> str:
    lines = [f"{name}: parameters and their defaults"]
    for parameter in parameters_of(name).values():
        lines.append(f"  {parameter.name}={parameter.default!r}  {parameter.allowed()}. {parameter.help}".rstrip())
    return "\n".join(lines)


@command_line("nothing was written under a final name")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_lib.notebooks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, words, pair in (("run", "run a chapter with other parameters into runs/", "parameter=value"),
                                 ("sweep", "run it at every combination of values", "parameter=value,value")):
        runner = commands.add_parser(command, help=words)
        runner.add_argument("name")
        runner.add_argument("pairs", nargs="*", metavar=pair)
        runner.add_argument("--from-env", metavar="VARIABLE", help="read the pairs from an environment variable")
    for command, words in {"refresh": "execute and write committed outputs", "show": "list parameters"}.items():
        several = commands.add_parser(command, help=words)
        several.add_argument("names", nargs="*")
        several.add_argument("--from-env", metavar="VARIABLE", help="read further names from this variable")
    commands.add_parser("prune-cache", help="drop outdated executions of the book build")
    options = parser.parse_args(arguments)
    text = os.environ.get(getattr(options, "from_env", None) or "", "")
    if options.command == "run":
        print(run(options.name, [*options.pairs, *parameters.split_assignments(text)]))
    elif options.command == "sweep":
        from .notebook_sweep import sweep

        sweep(options.name, [*options.pairs, *parameters.split_assignments(text)])
    elif options.command == "refresh":
        print("\n".join(str(path) for path in refresh([*options.names, *text.split()])))
    elif options.command == "show":
        print("\n".join(_describe(name) for name in [*options.names, *text.split()] or names()))
    elif prune_cache():
        print("library, kernels, results or lock changed: notebooks will be executed again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
