"""python -m sparsity_lib.stress [--quick] [NAME ...]: see the package."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sparsity_lib import results
from sparsity_lib.errors import command_line
from sparsity_lib.stress import base, experiment


def said(found: dict[str, Any]) -> str:
    """One trial's outcome as a line of the terminal, its losses below."""
    if "not_here" in found:
        return f"{'not here':9} {found['name']}: {found['not_here']}"
    counts = f"{found['tried']:6} tried, {found['right']:6} right, {found['refused']:6} refused, {found['lost']:3} lost"
    lines = [f"{'LOST' if found['lost'] else 'held':9} {found['name']:22} {counts} ({found['seconds']:.0f} s)"]
    return "\n".join([*lines, *(f"          {each}" for each in found["described"])])


@command_line("finished trials are kept, the same command resumes")
def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_lib.stress", description="Try faults and bad inputs.")
    parser.add_argument("names", nargs="*", help="trials; where none is named all, kept in results/stress.json")
    parser.add_argument("--quick", action="store_true", help="fewer attempts, and nothing is written")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    options = parser.parse_args(arguments)
    size = "quick" if options.quick else "full"
    if options.names or options.quick or options.seed:
        lost = 0
        for trial in base.find(options.names):
            found = base.run(trial, size, options.seed)
            lost += found["lost"]
            print(said(found), flush=True)
    else:
        results.make(experiment.NAME, {experiment.NAME: experiment.run})
        lost = sum(each["lost"] for each in results.load(experiment.NAME).data["trials"])
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
