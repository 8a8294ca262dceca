"""Where the book's notebooks can be opened with one click, and what they need there.

    python -m sparsity_lib.book.launch                # put the set-up cell into every chapter that lacks it
    python -m sparsity_lib.book.launch OWNER/NAME     # connect this copy to its GitHub repository

Binder builds an image from environment.yml and postBuild, so nothing else is needed there. Colab opens a single notebook; its
second cell, the same in every chapter, fetches the rest. Both open notebooks from a public GitHub repository only: which one
is `repository.url` in _config.yml, or the environment's SPARSITY_REPOSITORY.
"""

from __future__ import annotations

import os
import re
import sys
from urllib.parse import quote

import nbformat
import yaml

from sparsity_lib import project
from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.notebooks import find, names

SWITCH, BRANCH = "SPARSITY_REPOSITORY", "SPARSITY_BRANCH"
TAGS = ["setup", "remove-cell"]
_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_CELL = """\
# Where this notebook was opened alone (Colab): fetch the book and its library. Elsewhere this does nothing.
import importlib.util

if importlib.util.find_spec("sparsity_lib") is None:
    import os
    import subprocess
    import sys

    source = os.environ.get("SPARSITY_SOURCE", "https://github.com/{repository}")
    subprocess.run(["git", "clone", "--depth", "1", source, "sparsity-book"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", "./sparsity-book"], check=True)
    sys.path.insert(0, os.path.abspath("sparsity-book"))
    os.chdir("sparsity-book/notebooks")"""


def repository() -> str | None:
    """OWNER/NAME on GitHub: the environment's SPARSITY_REPOSITORY, else _config.yml's `repository.url`; None where neither says.

    Raises SparsityError for one that is not of this form.
    """
    config = yaml.safe_load((project.root() / "_config.yml").read_text())
    url = os.environ.get(SWITCH) or (config.get("repository") or {}).get("url") or ""
    name = url.removeprefix("https://github.com/").removesuffix(".git").strip("/")
    if not name:
        return None
    if not _NAME.match(name):
        raise refuse("repository", url, "OWNER/NAME or https://github.com/OWNER/NAME")
    return name


def links(chapter: str) -> dict[str, str]:
    """Service -> address that opens a chapter there; nothing where the repository is not known."""
    name = repository()
    if name is None:
        return {}
    branch = os.environ.get(BRANCH, "main")
    path = f"notebooks/{chapter}.ipynb"
    return {
        "Colab": f"https://colab.research.google.com/github/{name}/blob/{quote(branch)}/{path}",
        "Binder": f"https://mybinder.org/v2/gh/{name}/{quote(branch, safe='')}?urlpath={quote('lab/tree/' + path, safe='')}",
    }


def setup_cell() -> str:
    """The code of every chapter's set-up cell."""
    return _CELL.format(repository=repository() or "OWNER/NAME")


def insert(chapter: str) -> bool:
    """Put the set-up cell behind a chapter's title, or bring it up to date; returns whether the file changed."""
    path = find(chapter)
    notebook = nbformat.read(path, as_version=4)
    there = [cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]
    if there and there[0].source == setup_cell():
        return False
    if there:
        there[0].source = setup_cell()
    else:
        cell = nbformat.v4.new_code_cell(setup_cell(), id="setup", metadata={"tags": TAGS})
        notebook.cells.insert(1, cell)
    project.write_atomic(path, nbformat.writes(notebook) + "\n")
    return True


def connect(name: str) -> None:
    """Write the repository into _config.yml."""
    if not _NAME.match(name):
        raise refuse("repository", name, "OWNER/NAME")
    path = project.root() / "_config.yml"
    text = re.sub(r"\nrepository:\n  url: .*\n", "\n", path.read_text())
    project.write_atomic(path, text.replace("\nhtml:\n", f"\nrepository:\n  url: https://github.com/{name}\n\nhtml:\n", 1))


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    try:
        if arguments:
            connect(arguments[0])
        for chapter in names():
            if insert(chapter):
                print(f"notebooks/{chapter}.ipynb: set-up cell written")
    except SparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
