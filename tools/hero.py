"""Draw book/_static/hero.png, the README's picture, from the stored sweep: quality against weights skipped."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt

from sparsity_lib import project, results, style
from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments import common
from sparsity_lib.experiments.claws_report import sweep_points
from sparsity_lib.figures.claws import sweep

METHODS = ("cats", "claws", "larosa", "oracle", "random")


def main() -> int:
    """Write the picture; returns the exit code."""
    try:
        stored = results.load("claws_sweep").data
    except SparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    style.use()
    figure = sweep(sweep_points(stored, METHODS, common.DENSITIES))
    target = project.root() / "book" / "_static" / "hero.png"
    figure.savefig(target, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    print(target.relative_to(project.root()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
