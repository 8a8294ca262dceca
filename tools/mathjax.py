"""Put MathJax into book/_static, so that formulas are set without a network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sparsity_lib import project
from sparsity_lib.assets import asset_path
from sparsity_lib.errors import SparsityError


def _copy(target: Path) -> None:
    partial = target.with_name(".mathjax.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(asset_path("mathjax"), partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def main() -> int:
    """Copy the asset; returns the exit code."""
    target = project.root() / "book" / "_static" / "mathjax"
    try:
        with project.only_one(target.with_name(".mathjax.lock"), "book/_static/mathjax"):
            _copy(target)
        (target / "es5" / "tex-chtml.js").touch()  # newer than this script, for make
    except (SparsityError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
