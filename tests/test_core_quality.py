"""Quality against one forward of the whole model: losses, divergences, agreement; and the language-model halves."""

import pytest
import torch
from core_tiny import VOCABULARY, outputs, tiny, tokens
from torch.nn import functional

from sparsity_lib import SparsityError, fit, install, installed, lm, recipes
from sparsity_lib.evaluate.quality import Quality, evaluate, evaluate_pair
from sparsity_lib.install import installed_on

IDS = tokens(3, 12)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def plans(model):
    return {"cats": fit(recipes.cats(0.3), model, ids=IDS), "larosa": fit(recipes.larosa(0.5), model, ids=IDS)}


@torch.no_grad()
def log_probabilities(model, plan=None, ids=IDS):
    with installed(model, plan):
        return torch.log_softmax(model(input_ids=ids).logits.double(), -1)[:, :-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "mixtral", "mpt", "falcon"])
def test_the_dense_loss_is_the_models_own(family):
    model = tiny(family)
    found = evaluate(model, {}, IDS)["dense"]
    with torch.no_grad():
        for row, nll in zip(IDS, found.nll, strict=True):
            assert nll / 11 == pytest.approx(float(model(input_ids=row[None], labels=row[None]).loss), rel=1e-5)
    assert found.tokens == (11, 11, 11)
    assert max(abs(k) for k in found.kl) == 0 and found.agree == (11, 11, 11)


@pytest.mark.parametrize("name", ["cats", "larosa"])
def test_a_sparse_model_by_the_definitions(model, plans, name):
    dense, sparse = log_probabilities(model), log_probabilities(model, plans[name])
    found = evaluate(model, plans, IDS)[name]
    nll = -sparse.gather(-1, IDS[:, 1:, None]).sum((1, 2))
    kl = (dense.exp() * (dense - sparse)).sum((1, 2))
    torch.testing.assert_close(torch.tensor(found.nll).double(), nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(found.kl).double(), kl, rtol=1e-4, atol=0)
    assert list(found.agree) == (dense.argmax(-1) == sparse.argmax(-1)).sum(1).tolist()
    assert found.perplexity().value == pytest.approx(float((nll.sum() / 33).exp()), rel=1e-5)
    assert found.divergence().value == pytest.approx(float(kl.sum() / 33), rel=1e-4)
    assert min(found.kl) > 0.01 and installed_on(model) is None


def test_every_nth_token_only(model, plans):
    found = evaluate(model, plans, IDS, every=3)["cats"]
    dense, sparse = (log_probabilities(model, p)[:, ::3] for p in (None, plans["cats"]))
    assert found.tokens == (4, 4, 4)
    kl = (dense.exp() * (dense - sparse)).sum((1, 2))
    torch.testing.assert_close(torch.tensor(found.kl).double(), kl, rtol=1e-4, atol=0)
    nll = -sparse.gather(-1, IDS[:, 1::3, None]).sum((1, 2))
    torch.testing.assert_close(torch.tensor(found.nll).double(), nll, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 5, 33, 1000])
def test_the_size_of_the_heads_chunks_does_not_matter(model, plans, size, monkeypatch):
    whole = evaluate(model, plans, IDS)
    monkeypatch.setattr(lm, "HEAD_CHUNK", size)
    assert len(list(lm.chunks(33, model))) == -(-33 // size)
    for name, quality in evaluate(model, plans, IDS).items():
        for measure in ("nll", "kl", "agree"):
            assert getattr(quality, measure) == pytest.approx(getattr(whole[name], measure), rel=1e-4, abs=1e-6)


def test_batches_do_not_matter(model, plans):
    one, three = (evaluate(model, plans, IDS, batch_size=b)["larosa"] for b in (1, 3))
    assert one.kl == pytest.approx(three.kl, rel=1e-3) and one.nll == pytest.approx(three.nll, rel=1e-4)


def test_a_pair_of_models(model, plans):
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.3)
    for plan in (None, plans["cats"]):
        found = evaluate_pair(model, other, plan, IDS, every=2)
        dense, changed = log_probabilities(model)[:, ::2], log_probabilities(other, plan)[:, ::2]
        kl = (dense.exp() * (dense - changed)).sum((1, 2))
        torch.testing.assert_close(torch.tensor(found.kl).double(), kl, rtol=1e-4, atol=0)
        assert found.tokens == (6, 6, 6) and installed_on(other) is None
    same = evaluate_pair(model, model, plans["cats"], IDS)
    assert same.kl == pytest.approx(evaluate(model, plans, IDS)["cats"].kl, rel=1e-5)


def test_models_with_other_heads_are_no_pair(model):
    other = tiny("llama", seed=1)
    with pytest.raises(SparsityError, match="different heads"):
        evaluate_pair(model, other, None, IDS)


def test_a_sparse_model_is_nothing_to_compare_with(plans):
    sparse = install(tiny("llama"), plans["cats"])
    for run in (lambda: evaluate(sparse, {}, IDS), lambda: evaluate_pair(sparse, tiny("llama"), None, IDS)):
        with pytest.raises(SparsityError, match=r"uninstall\(model\) first"):
            run()


def test_bad_text_is_refused(model):
    for run in (lambda ids: evaluate(model, {}, ids), lambda ids: evaluate_pair(model, model, None, ids)):
        with pytest.raises(SparsityError, match="one token"):
            run(IDS[:, :1])
        with pytest.raises(SparsityError, match="ids = "):
            run(IDS[0])
    with pytest.raises(SparsityError, match="every"):
        evaluate(model, {}, IDS, every=0)


def test_an_interrupted_evaluation_leaves_a_dense_model(model, plans, monkeypatch):
    before, real, calls = outputs(model), lm.hidden_states, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(lm, "hidden_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, plans, IDS)
    assert installed_on(model) is None and torch.equal(outputs(model), before)


def test_quality_round_trips_through_json(model, plans):
    found = evaluate(model, plans, IDS)["cats"]
    assert Quality.from_json(found.to_json()) == found


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2", "mixtral"])
def test_the_two_halves_are_the_model(family):
    model = tiny(family)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits.float()
        halves = lm.logits(model, lm.hidden_states(model, IDS).flatten(0, 1)).view_as(whole)
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-5)
    assert whole.shape[-1] == VOCABULARY


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("size", [4, 128])
def test_the_loss_in_chunks_has_the_whole_losss_gradients(family, size, monkeypatch):
    monkeypatch.setattr(lm, "HEAD_CHUNK", size)
    model, whole = tiny(family), tiny(family)
    loss = lm.backward_next_token_loss(model, IDS)
    logits = whole(input_ids=IDS).logits.float()
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(whole.base_model.layers.named_parameters())
    for name, ours in model.base_model.layers.named_parameters():
        torch.testing.assert_close(ours.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_without_a_head_is_refused(model):
    with pytest.raises(SparsityError, match="no language-model head"):
        evaluate(model.model, {}, IDS)


def test_a_head_that_does_more_than_we_know_is_refused():
    model = tiny("llama")
    forward = model.forward

    def shifted(*args, **options):
        found = forward(*args, **options)
        found.logits = found.logits * 2
        return found

    lm.check_head(model)
    model.forward = shifted
    for run in (lambda: evaluate(model, {}, IDS), lambda: fit(recipes.claws(), model, ids=IDS)):
        with pytest.raises(SparsityError, match="changes its logits after the head"):
            run()
    fit(recipes.cats(), model, ids=IDS)  # a method without gradients never looks at the head
