"""Where the book's notebooks can be opened with one click, and what they need there.

    python -m sparsity_lib.book.launch OWNER/NAME     # connect this copy to its GitHub repository

Binder builds an image from environment.yml and postBuild, so nothing else is needed there. Colab opens a single notebook; a
set-up cell, the same in every chapter, fetches the rest. Both open notebooks from a public GitHub repository only: which one is
`repository.url` in _config.yml, empty until the command above has written it, together with the cells. The environment's
SPARSITY_REPOSITORY takes its place for one build.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

import nbformat
import yaml

from sparsity_lib import project
from sparsity_lib.errors import SparsityError, command_line, refuse
from sparsity_lib.notebooks import find, names

SWITCH = "SPARSITY_REPOSITORY"
GITHUB = "https://github.com/"
TAGS = ["setup", "remove-cell"]
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LINE = re.compile(r"(?m)^  url: .*$")
_CELL = """\
# Where this notebook was opened alone (Colab): fetch the book and install its library. Elsewhere this does nothing.
import importlib.util

if importlib.util.find_spec("sparsity_lib") is None:
    import os
    import subprocess
    import sys

    subprocess.run(["git", "clone", "--depth", "1", "{url}", "sparsity-book"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", "./sparsity-book"], check=True)
    sys.path.insert(0, os.path.abspath("sparsity-book"))
    os.chdir("sparsity-book/notebooks")"""


def repository() -> str | None:
    """OWNER/NAME on GitHub: the environment's SPARSITY_REPOSITORY, else _config.yml's `repository.url`; None where neither says.

    Raises SparsityError for one that is not of this form.
    """
    config = yaml.safe_load(_config().read_text())
    return _named(os.environ.get(SWITCH) or (config.get("repository") or {}).get("url") or "")


def branch() -> str:
    """The repository's branch that is opened."""
    return (yaml.safe_load(_config().read_text()).get("repository") or {}).get("branch") or "main"


def _named(text: str) -> str | None:
    name = text.removeprefix(GITHUB).strip("/").removesuffix(".git")
    if name and not _NAME.fullmatch(name):
        raise refuse("repository", text, f"OWNER/NAME or {GITHUB}OWNER/NAME")
    return name or None


def _config() -> Path:
    return project.root() / "_config.yml"


def links(chapter: str) -> dict[str, str]:
    """Service -> address that opens a chapter there; nothing where the repository is not known."""
    name = repository()
    if name is None:
        return {}
    at, path = branch(), f"notebooks/{chapter}.ipynb"
    return {
        "Colab": f"https://colab.research.google.com/github/{name}/blob/{quote(at)}/{path}",
        "Binder": f"https://mybinder.org/v2/gh/{name}/{quote(at, safe='')}?urlpath={quote('lab/tree/' + path, safe='')}",
    }


def how() -> str:
    """What the page on rerunning says about Colab and Binder, with the repository or without."""
    name = repository()
    if name is None:
        return (
            "This copy of the book is not connected to a public repository, so its chapters have no buttons for Binder and "
            "Colab. Once it is on GitHub, one command connects it. It writes the address into `_config.yml` and a set-up cell "
            "into every chapter; commit both, and the next build has the buttons:\n\n"
            "```bash\n.venv/bin/python -m sparsity_lib.book.launch OWNER/NAME\n```\n")
    return (
        "The buttons on each chapter open it in Binder, which needs nothing but a browser and takes some minutes to start, or in "
        f"Colab, whose first cell fetches the rest of [{name}]({GITHUB}{name}) and compiles the operators.\n")


def setup_cell(name: str) -> str:
    """The code of every chapter's set-up cell, for the repository OWNER/NAME."""
    return _CELL.format(url=f"{GITHUB}{name}")


def insert(chapter: str, name: str) -> bool:
    """Put the set-up cell behind a chapter's title, or bring it up to date; returns whether the file changed.

    It counts as executed, first of all: with the library at hand it does nothing and shows nothing.
    """
    path = find(chapter)
    notebook = nbformat.read(path, as_version=4)
    there = next((cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])), None)
    if there is not None and there.source == setup_cell(name):
        return False
    if there is None:
        for cell in notebook.cells:
            _count_on(cell)
        there = nbformat.v4.new_code_cell(id="setup", metadata={"tags": TAGS}, execution_count=1)
        notebook.cells.insert(1, there)
    there.source = setup_cell(name)
    project.write_atomic(path, nbformat.writes(notebook) + "\n")
    return True


def _count_on(cell: nbformat.NotebookNode) -> None:
    """One more cell was executed before this one."""
    for counted in (cell, *cell.get("outputs", ())):
        if counted.get("execution_count") is not None:
            counted.execution_count += 1


def connect(text: str) -> list[str]:
    """Write the repository into _config.yml and the set-up cell into every chapter; returns the chapters that changed."""
    name = _named(text)
    if name is None:
        raise refuse("repository", text, "OWNER/NAME")
    config = _config().read_text()
    if not _LINE.search(config):
        raise SparsityError("_config.yml has no line `url:` under `repository:`. Fix: add them.")
    project.write_atomic(_config(), _LINE.sub(f'  url: "{GITHUB}{name}"', config, count=1))
    return [chapter for chapter in names() if insert(chapter, name)]


@command_line("files are whole, the same command does the rest")
def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m sparsity_lib.book.launch OWNER/NAME", file=sys.stderr)
        return 2
    changed = connect(arguments[0])
    print(f"_config.yml names {repository()}; set-up cell written into: {', '.join(changed) or 'none, all have it'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
