"""The measurement of models that stay on disk: what is written is the shape, peaks are what was held, and files go."""

import mmap
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsity_lib import experiments, results
from sparsity_lib.assets import cache
from sparsity_lib.bench import memory_limit, streaming
from sparsity_lib.bench.memory_limit import group, most
from sparsity_lib.book import streaming as page
from sparsity_lib.errors import AssetError

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 64, "tie_word_embeddings": True}
PARAMS = {"size": "tiny", "shape": SHAPE, "tokens": 64, "length": 16, "dtype": "bfloat16", "density": 0.5}


@pytest.mark.parametrize("tied", [True, False])
def test_a_written_model_has_its_shape_in_a_file_a_block(tied, tmp_path):
    sizes = streaming.write(LlamaConfig(**{**SHAPE, "tie_word_embeddings": tied}), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sizes["bytes"] == sum(p.nbytes for p in model.parameters()) and len(list(tmp_path.glob("*.safetensors"))) == 6 - tied
    assert sizes["block"] == sum(p.nbytes for p in model.model.layers[0].parameters())
    assert sizes["outside"] == sizes["bytes"] - 3 * sizes["block"]
    assert sizes["bytes"] <= sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < sizes["bytes"] + 20_000
    assert float(model.model.layers[1].mlp.down_proj.weight.std()) == pytest.approx(48**-0.5, rel=0.1)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(AssetError, match="No space left"):
        streaming.write(LlamaConfig(**SHAPE), tmp_path)
    assert not list(tmp_path.iterdir())


def test_both_ways_are_measured_and_the_files_go(tmp_path):
    cases = [[recipe, how] for recipe in streaming.RECIPES for how in ("streamed", "ordinary")]
    found = streaming.measure({**PARAMS, "cases": cases}, tmp_path)
    assert not list(tmp_path.iterdir())
    assert found["both"] == found["equal"] == list(streaming.RECIPES)
    reads = {case: each["blocks_read"] for case, each in found["cases"].items()}
    assert reads == {"teal streamed": 3, "wina streamed": 3, "claws streamed": 12, **{f"{r} ordinary": 0 for r in found["both"]}}
    assert len({each["digest"] for each in found["cases"].values()}) == 3
    assert all(each["seconds"] > 0 and each["plan"] > 0 and each["statistics"] > 0 for each in found["cases"].values())
    text = streaming.table({"tiny": found})
    assert "the same plan both ways: 3 of 3" in text and text.count(" s to fit") == 6
    odd = {**found, "cases": {k: {**v, "above": None} for k, v in found["cases"].items()}}
    assert streaming.table({"tiny": odd}).count("unknown") == 6


def test_peaks_tell_own_memory_from_that_of_files(tmp_path):
    if streaming.Peaks().start is None:
        pytest.skip("no /proc here")
    size, pages = 64 << 20, (64 << 20) // mmap.PAGESIZE
    with streaming.Peaks() as peaks:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            held[:: mmap.PAGESIZE] = bytes(pages)
            peaks._done.wait(0.2)
    assert 60 << 20 < peaks.above()["anonymous"] < 80 << 20 and peaks.above()["files"] < 20 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    with streaming.Peaks() as peaks, open(tmp_path / "file", "rb") as handle:
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as held:
            assert sum(held[:: mmap.PAGESIZE]) == 0
            peaks._done.wait(0.2)
    assert 60 << 20 < peaks.above()["files"] < 80 << 20 and peaks.above()["anonymous"] < 20 << 20


def test_a_process_in_a_group_gets_no_more_than_it_is_allowed():
    """One that takes too much is killed; one that does not is told what it took."""
    code = ("import sys; from sparsity_lib.bench.memory_limit import join; join(sys.argv[1]); "
            "held = bytearray(int(sys.argv[2])); held[::4096] = bytes(len(held[::4096]))")
    with group(64 << 20) as place:
        if place is None:
            pytest.skip("this system or user can make no control group")
        codes = [subprocess.run([sys.executable, "-c", code, str(place), str(size)]).returncode for size in (16 << 20, 256 << 20)]
        assert codes == [0, -signal.SIGKILL] and 16 << 20 < most(place) <= 64 << 20
    assert not place.exists()


def test_a_limit_is_kept_with_what_was_measured(tmp_path):
    found = streaming.measure({**PARAMS, "cases": [["teal", "streamed"]], "limit": 1 << 30}, tmp_path)["cases"]["teal streamed"]
    if "limit" not in found:
        pytest.skip("this system or user can make no control group")
    assert found["limit"] == 1 << 30 and 0 < found["held"] < 1 << 30
    assert "allowed 1,024 MiB" in streaming.table({"tiny": {"bytes": 1, "block": 1, "outside": 1, "equal": [], "both": [],
                                                            "cases": {"teal streamed": found}}})


def test_without_control_groups_there_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_limit, "_FORMS", ((tmp_path / "none", "a", "b"), (tmp_path, "a", "b")))
    with group(1 << 30) as place:
        assert place is None
    assert memory_limit.most(tmp_path) is None


def test_sizes_are_what_they_are_called():
    for name, shape in streaming.SIZES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(float(name[:-1]), rel=0.36)
    assert streaming.cases("8B") == [[recipe, "streamed"] for recipe in ("teal", "wina", "claws")]
    assert len(streaming.cases("1B")) == 6 and experiments.EXPERIMENTS["bench/streaming"] is streaming.run


def test_the_book_shows_what_is_there(monkeypatch):
    monkeypatch.setattr(results, "names", lambda: [])
    assert "make results R=bench/streaming" in page.costs()
    above = {"anonymous": 1 << 30, "files": 2 << 30, "resident": 3 << 30}
    case = {"above": above, "open": 30.0, "seconds": 90.0}
    data = {"1B": {"bytes": 4 << 30, "block": 1 << 29, "cases": {"teal streamed": case, "teal ordinary": case,
                                                                 "claws streamed": {**case, "above": None, "limit": 4 << 30}}}}
    monkeypatch.setattr(results, "names", lambda: [page.RESULT])
    monkeypatch.setattr(results, "load", lambda name: results.Result(name, data, {"params": {"tokens": 512}}))
    rows = [line for line in page.costs().splitlines() if line.startswith("| 1B")]
    assert len(rows) == 2 and rows[0].count("1.00") == 1 and "3.00" in rows[0] and "TEAL" in rows[0]
    assert rows[0].count("–") == 1 and rows[1].count("–") == 3 and "4.00" in rows[1] and "512 tokens" in page.costs()


def test_the_kept_result_holds_what_is_claimed():
    if page.RESULT not in results.names():
        pytest.skip("not measured yet")
    data = results.load(page.RESULT).data
    for found in data.values():
        assert found["equal"] == found["both"]
        for case, of in found["cases"].items():
            if case.endswith("streamed") and of["above"] is not None:
                bound = found["outside"] + 2 * found["block"]
                assert of["above"]["files"] < bound + (256 << 20), case
