"""The explorer's masks: ranks by the slow way, scores of a tiny model."""

import base64

import numpy as np
import pytest
import torch

from sparsity_lib.experiments import EXPERIMENTS
from sparsity_lib.experiments import explorer_masks as masks


def slow(scores, ranked):
    """Rank of each entry by counting how many are smaller (or equal and before it)."""
    rows = scores if ranked == "token" else scores.reshape(1, -1)
    out = np.empty(rows.shape)
    for r, row in enumerate(rows):
        for i, value in enumerate(row):
            out[r, i] = sum(other < value or (other == value and j < i) for j, other in enumerate(row))
    return np.round(255 * out / max(1, rows.shape[1] - 1)).reshape(scores.shape)


@pytest.mark.parametrize("ranked", ["token", "layer"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (4, 9)])
def test_ranks_are_those_of_counting(ranked, shape):
    scores = np.random.default_rng(0).integers(0, 5, shape).astype(np.float32)
    found = masks.ranks(torch.tensor(scores), ranked)
    assert found.dtype == torch.uint8 and found.shape == shape
    assert np.abs(found.numpy().astype(int) - slow(scores, ranked)).max() <= 0


def test_bytes_are_whole():
    values = torch.arange(256, dtype=torch.uint8).view(4, 64)[:, :10]
    assert base64.b64decode(masks.encoded(values)) == values.numpy().tobytes()


def test_every_score_has_a_way_to_be_ranked_and_the_experiment_a_name():
    from sparsity_lib.book.explorer import SCORES, SHOWN

    assert set(SCORES.values()) <= set(masks.RANKED) and set(masks.RANKED.values()) == {"token", "layer"}
    assert {score.partition("_")[0] for score in masks.RANKED} == set(SHOWN)
    assert EXPERIMENTS["explorer_masks"] is masks.run
