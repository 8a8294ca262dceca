"""The measurements of evaluation and calibration: both engines answer the same requests, and peaks are what was held."""

import json
import mmap

import pytest
import torch
import transformers
from core_tiny import tiny, tokens

from sparsity_lib import results
from sparsity_lib.assets import load_tokenizer, model_path
from sparsity_lib.bench import calibration, evaluation
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.tasks import MMLU_SUBJECTS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(model_path("smollm2-135m-instruct")))


def model(tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.5,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def piqa():
    return evaluation.parts(("piqa",), 0, 6, 2)


def test_parts_hold_every_document_once_with_all_its_choices(piqa):
    assert [len(part.documents) for part in piqa] == [3, 3]
    assert len({document["goal"] for part in piqa for _, document, _ in part.documents}) == 6
    assert all([r.idx for r in requests] == [0, 1] for part in piqa for _, _, requests in part.documents)
    few = evaluation.parts(evaluation.SUBJECTS[:2], 2, 5, 2)
    assert [len(part.documents) for part in few] == [2, 2], "a subject is a part, with its share of the documents"
    assert all(request.args[0].count("Answer:") == 3 for part in few for request in part.requests)


def test_engines_are_compared_on_equal_terms(piqa, tokenizer):
    found = evaluation.compare(model(tokenizer), tokenizer, piqa, (1, 3), "acc")
    assert found["documents"] == 6 and found["requests"] == 12 and found["by_blocks"]
    assert found["flipped"] == 0 and found["accuracy"]["hflm"] == found["accuracy"]["prefix"]
    assert found["largest_difference"] < 1e-3  # float32: some hundred nats, each to 1e-6 of itself
    assert found["batch_size"] in (1, 3) and set(found["first_part"]) == {"1", "3"}
    best = found["first_part"][str(found["batch_size"])]["wall"]
    assert best == min(each["wall"] for each in found["first_part"].values()) and best < found["hflm"]["wall"]
    assert found["ratio"] == pytest.approx(found["hflm"]["wall"] / found["prefix"]["wall"])
    assert len(found["ratio_of_parts"]) == 2 and len(found["of_batches"]) == 1
    assert min(found["ratio_of_parts"]) <= found["ratio"] <= max(found["ratio_of_parts"])
    assert "6 documents" in evaluation.line("PIQA", found)


def test_differences_between_engines_are_seen(piqa):
    right = [(0.0 if r.idx == int(r.doc["label"]) else -1.0, False) for part in piqa for r in part.requests]
    wrong = [(-1.0 - value, greedy) for value, greedy in right]
    same = evaluation.outcomes(piqa, right, right, "acc")
    assert same["accuracy"] == {"hflm": 1.0, "prefix": 1.0} and same["flipped"] == 0 == same["largest_difference"]
    other = evaluation.outcomes(piqa, right, [*wrong[:2], *right[2:]], "acc")
    assert other["accuracy"]["prefix"] == pytest.approx(5 / 6) and other["flipped"] == 1 == other["largest_difference"]


def test_rounding_is_measured_against_float32(piqa, tokenizer):
    models = {dtype: (model(tokenizer, dtype), tokenizer) for dtype in (torch.float32, torch.bfloat16)}
    found = evaluation.exactness(models, piqa[:1], "acc")
    assert found["largest_difference"] < 1e-3 < min(found["bfloat16"].values())


def test_totals_add_seconds_and_weigh_by_size():
    sets = [
        {"hflm": {"wall": 6.0, "cpu": 8.0}, "prefix": {"wall": 2.0, "cpu": 2.0}, "documents": 10, "available": 10},
        {"hflm": {"wall": 2.0, "cpu": 4.0}, "prefix": {"wall": 2.0, "cpu": 4.0}, "documents": 10, "available": 90},
    ]
    found = evaluation.total(sets)
    assert found["ratio"] == 2.0 and found["ratio_cpu"] == 2.0 and found["ratio_of_whole_sets"] == pytest.approx(24 / 20)


def test_the_subjects_are_spread_over_mmlu():
    assert len(evaluation.SUBJECTS) == len(set(evaluation.SUBJECTS)) == 5
    assert evaluation._available("boolq") == 3270 and evaluation._available("piqa") == 1838
    assert sum(evaluation._available(f"mmlu_{subject}") for subject in MMLU_SUBJECTS) == 14042


@pytest.mark.parametrize("method", calibration.CHOSEN)
def test_calibration_is_measured_in_one_pass(method):
    short, long = (calibration.measure(tiny(), tokens(count, 12), method, 0.5) for count in (2, 8))
    assert short["passes"] == long["passes"] == 1.0 and (short["tokens"], long["tokens"]) == (24, 96)
    assert 0 < short["statistics"] == long["statistics"], "statistics grew with the text"
    assert short["plan"] > 0 and long["seconds"] > 0 and (long["peak"] is None or long["peak"] >= 0)
    assert short["model"] == sum(p.numel() * p.element_size() for p in tiny().parameters())
    assert method in calibration.line("tiny", method, short)
    assert "unknown" in calibration.line("tiny", method, {**short, "peak": None})


def test_a_peak_is_what_was_held_in_between():
    before = calibration._start_peak()
    if before is None:
        pytest.skip("peaks cannot be reset here")
    size = 64 << 20
    with mmap.mmap(-1, size) as held:  # not from the heap, which may hold as much already
        held[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
    assert 60 << 20 < calibration._resident("VmHWM") - before < 80 << 20


def test_a_child_measures_a_shape_and_says_why_it_failed():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}
    params = {"model": "tiny", "shape": shape, "method": "cats", "tokens": 64, "length": 32, "density": 0.5, "dtype": "bfloat16"}
    found = calibration.in_child(params)
    assert found["tokens"] == 64 and found["passes"] == 1.0
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(SparsityError, match="tiny ended with .*density"):
        calibration.in_child({**params, "density": 2.0})


def test_the_kept_results_can_be_shown_and_hold_what_is_claimed():
    data = results.load("bench/evaluation").data
    assert f"{data['total']['ratio']:.2f} x" in evaluation.table(data) and set(data["sets"]) == set(evaluation.SETS)
    assert data["total"] == evaluation.total(data["sets"].values())
    assert all(found["flipped"] == 0 and found["largest_difference"] < 1e-3 for found in data["float32"].values())
    data = results.load("bench/calibration").data
    assert calibration.table(data).count("tokens/s") == 3 * (3 + 2 + 2)
    everything = [f for kind in data.values() for methods in kind.values() for each in methods.values() for f in each.values()]
    assert {found["passes"] for found in everything} == {1.0}
    for methods in data["text"].values():
        for each in methods.values():
            assert len({found["statistics"] for found in each.values()}) == 1, "statistics grew with the text"
