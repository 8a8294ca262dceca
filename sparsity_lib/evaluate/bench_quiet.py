"""Keeps lm-eval's remarks and progress bars out of the output while we drive it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from unittest import mock

import datasets
from tqdm import tqdm


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence warnings about settings chosen on purpose, and one bar a task (57 for MMLU); errors still show."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    silent = functools.partial(tqdm, disable=True)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with mock.patch.object(importlib.import_module("lm_eval.api.task"), "tqdm", silent):
            yield
    finally:
        logger.setLevel(before)
        if bars:
            datasets.enable_progress_bars()
