"""Files that know their checksum, and error messages that stay short whatever a file holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsity_lib import sealed
from sparsity_lib.errors import SHOWN, refuse, shown, unknown

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64), "empty": torch.zeros(0, 4),
           "one": torch.tensor(2.5)}
META = {"format": "x-1", "more": "ä"}


@pytest.fixture
def file(tmp_path):
    sealed.write(tmp_path / "x.safetensors", TENSORS, META)
    return tmp_path / "x.safetensors"


def test_it_comes_back_whole_and_is_an_ordinary_file(file):
    tensors, meta = sealed.read(file, "x-1")
    assert meta == META and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert load_file(file).keys() == TENSORS.keys() and [path.name for path in file.parent.iterdir()] == ["x.safetensors"]


def test_the_same_content_is_the_same_file(tmp_path):
    """The format's own writer orders metadata by a hash table that differs from call to call."""
    meta = {"format": "x-1", **{f"key {i} é\u0001\"": str(i) for i in range(6)}}
    for i in range(20):
        sealed.write(tmp_path / str(i), TENSORS, meta)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    tensors, found = sealed.read(tmp_path / "0", "x-1")
    assert found == meta and torch.equal(tensors["a"], TENSORS["a"])


def test_no_tensors_are_no_tensors(tmp_path):
    sealed.write(tmp_path / "x", {}, META)
    assert sealed.read(tmp_path / "x", "x-1") == ({}, META)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bit_is_missed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bits") / "x"
    sealed.write(path, TENSORS, META)
    whole = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(broken))
    with pytest.raises(ValueError):
        sealed.read(path, "x-1")


def test_names_dtypes_and_shapes_belong_to_the_content():
    sums = [sealed.checksum({"a": t}, {}) for t in (torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32))]
    sums += [sealed.checksum({"b": torch.zeros(2, 3)}, {}), sealed.checksum({"a": torch.zeros(2, 3)}, {"x": "y"})]
    assert len(set(sums)) == len(sums)
    assert sealed.checksum(dict(reversed(TENSORS.items())), META) == sealed.checksum(TENSORS, META)


def test_a_checksum_is_asked_for(tmp_path):
    save_file(TENSORS, tmp_path / "old", metadata={"format": "x-0"})
    save_file(TENSORS, tmp_path / "bare", metadata={"format": "x-1"})
    for name, said in (("old", "format 'x-0'"), ("bare", "no checksum"), ("absent", "")):
        with pytest.raises(ValueError, match=said):
            sealed.read(tmp_path / name, "x-1")


class Silent:
    def __repr__(self):
        raise RuntimeError


def test_messages_stay_short():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10**6, 10**400, 10**10_000, deep, Silent(), [0] * 10**5):
        assert len(str(refuse("k", value, "2"))) < SHOWN + 120
        assert len(str(unknown("name", value, ["a", "b"]))) < SHOWN + 150
    assert shown("a") == "'a'" and "1,000,002 letters" in shown("x" * 10**6) and "RecursionError" in shown(deep)
    assert "did you mean 'block1'" in str(unknown("name", "block2", ["block1"]))
