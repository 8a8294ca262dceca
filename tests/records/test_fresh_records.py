"""The numbers of the notebooks that nbval has just run, against the committed ones (see `make nbval`)."""

import os
from pathlib import Path

import pytest

from sparsity_lib import project, records

COMMITTED = project.root() / "notebooks" / "records"
NAMES = sorted(path.stem for path in COMMITTED.glob("*.json"))


def test_every_chapter_has_a_record():
    assert sorted(path.stem for path in (project.root() / "notebooks").glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_numbers_agree_within_their_tolerances(name):
    fresh = records.read(Path(os.environ[records.SWITCH]) / f"{name}.json")
    found = records.differences(records.read(COMMITTED / f"{name}.json"), fresh)
    assert not found, "\n".join(found)
