"""What the patterns chapter looks at, on a small granular network: masks by layer and vocabulary, questions, kinds of tokens."""

import json

import pytest
import torch
from core_tiny import tiny, tokens
from hypothesis import given
from hypothesis import strategies as st

from sparsity_lib import SparsityError, load_model
from sparsity_lib.bench import cwic as bench
from sparsity_lib.cwic import CWICConfig, convert, measure
from sparsity_lib.decode import Decoder
from sparsity_lib.experiments import cwic_patterns
from sparsity_lib.experiments.cwic_small import stripes
from sparsity_lib.experiments.cwic_tokens import KINDS, Marked, kinds_of, marked, padded, question
from sparsity_lib.ops import library


@pytest.fixture
def shipped(monkeypatch):
    """The small Llama at 2x by thresholds that nobody learned."""
    def load(name, dtype=torch.float32):
        model, tokenizer = load_model("small-llama", dtype=dtype)
        ids = cwic_patterns.common.evaluation_ids(tokenizer, sequences=2, length=32)
        bench.impose(model, convert(model, CWICConfig(stripe=stripes(64), uneven=True)), ids, 2.0)
        return model, tokenizer

    monkeypatch.setattr(cwic_patterns, "load_shipped", load)


def test_thresholds_are_imposed_for_a_ratio():
    model, ids = tiny("llama"), tokens(4, 20)
    registry = convert(model, CWICConfig(stripe=8, uneven=True))
    dense = measure(model, ids).ratio()
    bench.impose(model, registry, ids, 2.0)
    assert dense == pytest.approx(1.0) and measure(model, ids).ratio() == pytest.approx(2.0, rel=0.05)


def test_imposed_thresholds_meet_the_ratio_of_the_whole_model():
    model, ids = tiny("llama"), tokens(4, 20)
    bench.meet(model, convert(model, CWICConfig(stripe=8, uneven=True)), ids, 3.0)
    assert measure(model, ids).ratio() == pytest.approx(3.0, rel=0.03)


def test_views_of_a_network_are_plain_data(shipped):
    text = {"sequences": 2, "length": 32}
    found = cwic_patterns.frequencies("x", {"text": text, "counted": {"tokens": 1024, "length": 64, "seed": 0}})
    assert json.loads(json.dumps(found)) == found
    assert set(found["channels"]) == {"q", "k", "v", "o", "gate"} and len(found["channels"]["q"]) == 5
    assert list(found["gates"]) == ["0", "2", "4"] and len(found["gates"]["0"]) == 6
    assert len(found["head"]) == len(found["occurrences"]) == 16 and sum(found["occurrences"]) == 1024
    kinds = cwic_patterns.kinds("x", {"text": text})
    assert len(kinds["texts"]) == 2 and all(sum(n for _, n in t.values()) == 32 for t in kinds["texts"])
    assert all(t["first"][1] == 1 and set(t) <= set(KINDS) for t in kinds["texts"])
    shown = cwic_patterns.shown("x", {"texts": ["The sky."], "answer": 3})
    assert len(shown["texts"][0]["tokens"]) == shown["texts"][0]["prompt"] + 3
    assert all(0 < read <= shown["dense"] for _, read, _ in shown["texts"][0]["tokens"])


def test_questions_are_measured_by_their_own_tokens(shipped):
    found = cwic_patterns.arc("x", {"documents": 3, "longest": 80, "seed": 0})
    for config in ("ARC-Easy", "ARC-Challenge"):
        assert len(found[config]["read"]) == 3 and max(found[config]["tokens"]) <= 80
    model, tokenizer = cwic_patterns.load_shipped("x")
    text = marked(tokenizer, "Why is the sky blue?")
    alone = measure(model, torch.tensor([text.ids])).active_parameters()[0]
    ids, segments, own = padded([text, marked(tokenizer, "How long does it take to boil an egg in the mountains?")])
    together = measure(model, ids, segments, batch_size=2).per_sequence(own)
    assert float(together[0]) == pytest.approx(float(alone.mean()), rel=0.01)


def test_kinds_of_tokens():
    pieces = ["Sys", " User", "The", " sky", " is", ",", " blue", " the", " sky", " is", ",", " END"]
    ids = [90, 91, 1, 2, 3, 4, 5, 6, 2, 3, 4, 92]
    found = kinds_of(ids, pieces, start=2, end=11)
    assert found == ["template", "template", "other", "other", "filler", "punctuation", "other", "filler", "repeated", "filler",
                     "punctuation", "template"]
    assert kinds_of([1, 2], ["a", "b"]) == ["first", "other"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_repeated_spans_stood_before_without_overlap(ids):
    found = kinds_of(ids, ["x"] * len(ids))
    for place in range(1, len(ids)):
        spans = [s for s in range(max(0, place - 2), place + 1) if s + 3 <= len(ids)]
        before = any(ids[s : s + 3] == ids[e : e + 3] for s in spans for e in range(0, s - 2))
        assert (found[place] == "repeated") == before


def test_texts_are_marked_in_the_chat_format_and_padded():
    class Tokenizer:
        chat_template = "x"

        def __call__(self, text, add_special_tokens):
            return type("Found", (), {"input_ids": [ord(c) for c in text]})

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"<u>{messages[0]['content']}<a>"

    found = marked(Tokenizer(), "hi", "yo")
    assert "".join(map(chr, found.ids)) == "<u>hi<a>yo" and (found.start, found.end) == (3, 5)
    ids, segments, own = padded([found, Marked((7,), 0, 1)])
    assert ids.shape == (2, 10) and segments.sum(1).tolist() == [10, 1] and own.sum(1).tolist() == [2, 1]
    assert question({"question": "Why?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}}) == "Why?\nA. x\nB. y"
    with pytest.raises(SparsityError, match="no text"):
        padded([])


def test_granular_products_are_timed_against_columns():
    found = bench.measure_product({"width": 256, "stripe": 128, "kept": (1.0, 0.5), "rounds": 2})
    assert set(found["stripes_over_columns"]) == {"1.000", "0.500"} and len(found["points"]) == 4
    assert all(len(p["times_as_fast"]) == 2 for p in found["points"])


@pytest.mark.skipif(library.path() is None, reason="no compiled library")
def test_a_decoder_reads_on_where_it_stopped():
    model, ids = tiny("llama"), tokens(1, 20)[0]
    engine = bench.Reading(Decoder(model, capacity=18), ids)
    engine.at(15)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    for call, place in enumerate((15, 16, 17, 15)):  # the cache holds 18, so the fourth call starts again
        torch.testing.assert_close(engine(call), logits[place], rtol=1e-3, atol=1e-3)
    assert len(engine.read) == 4 and min(engine.read) > 0
