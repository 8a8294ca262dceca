"""Which browser opens the built pages, for checks and for print."""

from __future__ import annotations

import os
import shutil

from sparsity_lib.errors import SparsityError

#: Names it (a path); else the first of NAMES on the path.
SWITCH = "CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def chromium() -> str:
    """Path of a Chromium or Chrome.

    Raises
    ------
    SparsityError
        Where there is none.
    """
    found = os.environ.get(SWITCH) or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise SparsityError(
            f"no Chromium found. Fix: install one (Debian: apt install chromium), or name it: {SWITCH}=/path/to/it")
    return found
