"""Packing: documents in rows, and a model that treats each as if it were alone."""

import pytest
import torch
from core_tiny import VOCABULARY, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_lib import SparsityError
from sparsity_lib.train.packing import block_mask, chats, model_inputs, pack, positions


class Spelling:
    """A tokenizer of single characters with a chat format of its own."""

    chat_template = "<role>content"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        return "".join(f"<{m['role'][0]}>{m['content']}." for m in messages)

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return type("Ids", (), {"input_ids": [ord(c) for c in text]})


def documents(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=g).tolist() for n in lengths]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=20), st.integers(4, 12))
def test_every_document_that_fits_is_there_once(lengths, length):
    given_ = documents(lengths)
    fitting = sorted(d for d in given_ if 2 <= len(d) <= length)
    if not fitting:
        with pytest.raises(SparsityError, match="None of"):
            pack(given_, length)
        return
    rows = pack(given_, length, padding=1)
    ids, segments = rows["input_ids"], rows["segments"]
    found = [ids[r][segments[r] == s].tolist() for r in range(len(ids)) for s in range(1, int(segments[r].max()) + 1)]
    assert sorted(found) == fitting and (ids[segments == 0] == 1).all()
    assert all((segments[r].diff()[segments[r].diff() != 0][:-1] == 1).all() for r in range(len(ids)))
    used = (segments > 0).sum(1)
    assert len(ids) == 1 or int(sum(sorted(used.tolist())[:2])) > length  # no two rows would fit into one


def test_positions_and_masks_start_anew_with_each_document():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    assert positions(segments).tolist() == [[0, 1, 0, 1, 2, 0]]
    mask = block_mask(segments)[0, 0]
    for i in range(6):
        for j in range(6):
            assert bool(mask[i, j]) == (j <= i and int(segments[0, i]) == int(segments[0, j]))
    assert mask.any(1).all()  # padding sees itself: no softmax over nothing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_is_read_as_if_alone(attention):
    model = tiny("llama")
    model.set_attn_implementation(attention)
    rows = pack(documents([5, 4, 7, 3]), 10)
    ids, segments = rows["input_ids"], rows["segments"]
    with torch.no_grad():
        packed = model(**model_inputs(model, ids, segments)).logits
        for r in range(len(ids)):
            for s in range(1, int(segments[r].max()) + 1):
                inside = segments[r] == s
                alone = model(ids[r][inside][None]).logits[0]
                torch.testing.assert_close(packed[r][inside], alone, rtol=1e-4, atol=1e-4)
    assert packed.isfinite().all()
    assert set(model_inputs(model, ids, None)) == {"input_ids"}
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(SparsityError, match="sdpa or eager"):
        model_inputs(model, ids, segments)


def test_chats_follow_the_tokenizers_format():
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert chats(Spelling(), [talk]) == [[ord(c) for c in "<u>hi.<a>yo."]]
    plain = Spelling()
    plain.chat_template = None
    with pytest.raises(SparsityError, match="no chat format"):
        chats(plain, [talk])
    for bad in ([], "hello", [{"role": "user"}], ["hello"]):
        with pytest.raises(SparsityError, match="conversation"):
            chats(Spelling(), [bad])


def test_nothing_to_pack_is_refused():
    for docs in ([], [[5]], [[1] * 20]):
        with pytest.raises(SparsityError, match="None of"):
            pack(docs, 8)
    with pytest.raises(SparsityError, match="length"):
        pack([[1, 2]], 1)
