"""Errors by rank against a loop over words."""

import pytest
import torch
from core_tiny import VOCABULARY, tiny, tokens

from sparsity_lib import SparsityError, fit, installed, recipes
from sparsity_lib.evaluate.ranks import errors_by_rank

IDS = tokens(2, 12)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", tie_word_embeddings=True)


def test_errors_by_rank_are_those_of_a_loop(model):
    plans = {name: fit(recipe, model, ids=IDS) for name, recipe in
             (("teal", recipes.teal(0.5)), ("head", recipes.with_head(recipes.teal(0.5), 0.3, refine=0.1)))}
    found = errors_by_rank(model, plans, IDS, edges=(1, 5))
    for name, plan in plans.items():
        groups = [[], [], []]
        for sequence in IDS:
            with torch.inference_mode():
                dense = model(sequence[None]).logits[0].log_softmax(-1)
                with installed(model, plan):
                    sparse = model(sequence[None]).logits[0].log_softmax(-1)
            for p, q in zip(dense, sparse, strict=True):
                for rank, word in enumerate(p.argsort(descending=True, stable=True).tolist(), start=1):
                    groups[0 if rank == 1 else 1 if rank <= 5 else 2].append((q[word] - p[word]).item() ** 2)
        assert [len(g) for g in groups] == [24, 96, 24 * (VOCABULARY - 5)]
        assert found[name] == pytest.approx([(sum(g) / len(g)) ** 0.5 for g in groups], rel=1e-4)
    assert max(errors_by_rank(model, {"all": fit(recipes.inputs_topk(1.0), model, ids=IDS)}, IDS, edges=(3,))["all"]) < 1e-4


def test_edges_have_to_rise_and_leave_words(model):
    for edges in ((), (0,), (3, 3), (5, 2), (VOCABULARY,)):
        with pytest.raises(SparsityError, match="edges"):
            errors_by_rank(model, {}, IDS, edges=edges)
