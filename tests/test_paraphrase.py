"""Judging pairs by cosine: thresholds, held-out halves, the area under the curve, and embeddings without padding."""

import numpy as np
import pytest
import torch
from core_tiny import tiny
from hypothesis import given
from hypothesis import strategies as st

from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.paraphrase import best_threshold, embed, judged, roc_auc

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12)


@given(PAIRS)
def test_no_border_is_right_more_often(pairs):
    scores, labels = np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs])
    found = ((scores > best_threshold(scores, labels)) == labels).sum()
    assert found == max(((scores > border) == labels).sum() for border in np.arange(-1, 6, 0.25))


@given(PAIRS.filter(lambda pairs: 0 < sum(label for _, label in pairs) < len(pairs)))
def test_the_area_counts_pairs(pairs):
    scores, labels = [p[0] for p in pairs], [p[1] for p in pairs]
    wins = [(a > b) + 0.5 * (a == b) for a, x in pairs if x for b, y in pairs if not y]
    assert roc_auc(np.array(scores), np.array(labels)) == pytest.approx(sum(wins) / len(wins))


def test_each_half_is_judged_by_the_other():
    labels = np.array([0, 1, 1, 0] * 5)
    scores = np.where(labels, 0.9, 0.1)
    assert judged(scores, labels).all()
    scores[::2] -= 5  # the even half lies lower: the odd half's border calls all of it negative
    assert judged(scores, labels)[::2].tolist() == (1 - labels[::2]).tolist()


def test_bad_pairs_are_refused():
    with pytest.raises(SparsityError, match="both labels"):
        roc_auc(np.array([0.1, 0.2]), np.array([1, 1]))
    with pytest.raises(SparsityError, match="one label a score"):
        judged(np.array([0.1, 0.2]), np.array([1]))
    with pytest.raises(SparsityError, match="not finite"):
        best_threshold(np.array([0.1, np.nan]), np.array([0, 1]))
    with pytest.raises(SparsityError, match="at least one text"):
        embed(None, None, [])


class Letters:
    """A tokenizer: a token a letter."""

    def __call__(self, text, truncation, max_length):
        return type("Found", (), {"input_ids": [ord(c) - 90 for c in text][:max_length]})


def test_embeddings_do_not_depend_on_what_shares_the_batch():
    model = tiny("bert").base_model
    texts = ["abcd", "az", "abcd", "dcba", "zz"]
    found = embed(model, Letters(), texts)
    alone = torch.cat([embed(model, Letters(), [text]) for text in texts])
    torch.testing.assert_close(found, alone)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(embed(model, Letters(), ["abcdef"], longest=4), found[:1])
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[7, 8, 9, 10]])).last_hidden_state.mean(1)
    torch.testing.assert_close(found[0], hidden[0] / hidden[0].norm())
