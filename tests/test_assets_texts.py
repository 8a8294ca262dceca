"""Benchmarks and texts: the right rows, roles that never mix, sequences of tokens."""

import pytest
import torch

from sparsity_lib.assets import (
    ROLES,
    SOURCES,
    benchmark_configs,
    benchmark_names,
    benchmark_path,
    load_benchmark,
    load_tokenizer,
    passages,
    sources,
    texts,
    token_sequences,
)
from sparsity_lib.assets.overlap import RUN, all_runs, overlapping
from sparsity_lib.errors import AssetError, SparsityError

ROWS = {
    ("ai2_arc", "validation"): 869, ("ai2_arc", "test"): 3548, ("boolq", "validation"): 3270,
    ("glue", "validation"): 1557, ("gsm8k", "test"): 1319, ("hellaswag", "validation"): 10042,
    ("lambada", "test"): 5153, ("mmlu", "dev"): 285, ("mmlu", "validation"): 1531, ("mmlu", "test"): 14042,
    ("openbookqa", "validation"): 500, ("piqa", "validation"): 1838, ("sciq", "validation"): 1000,
    ("trivia_qa", "validation"): 7993, ("winogrande", "validation"): 1267,
}


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2-135m-instruct")


def test_every_split_has_its_published_number_of_rows():
    found: dict[tuple[str, str], int] = {}
    for name in benchmark_names():
        for config, splits in benchmark_configs(name).items():
            for split in splits:
                rows = load_benchmark(name, config, split).num_rows
                found[name, split] = found.get((name, split), 0) + rows
    assert found == ROWS
    assert len(benchmark_configs("mmlu")) == 57


def test_rebuilt_documents_have_the_stock_fields():
    stored, rebuilt = load_benchmark("ai2_arc", "ARC-Easy"), load_benchmark("ai2_arc", "ARC-Easy", "test")
    assert stored.features == rebuilt.features
    assert all(row["answerKey"] in row["choices"]["label"] for row in rebuilt)
    assert not any(row["question"].startswith("Question:") or "Answer:" in row["question"][-8:] for row in rebuilt)
    gsm8k = load_benchmark("gsm8k", split="test")
    assert gsm8k.column_names == ["question", "answer"] and all("\n#### " in row["answer"] for row in gsm8k)
    lambada = load_benchmark("lambada", split="test")["text"]
    assert lambada[0].split(" ")[-1] == "signs" and lambada[0].startswith("In my palm is a clear stone")
    assert sum(text.split(" ")[-1] == "" for text in lambada) == 0


def test_wrong_number_of_rows_is_refused(monkeypatch):
    table = {name: dict(entry) for name, entry in texts.load_benchmark.__globals__["table"]().items()}
    table["boolq"] = {**table["boolq"], "configs": {"none": {"validation": 3271}}}
    monkeypatch.setattr("sparsity_lib.assets.benchmarks.table", lambda: table)
    with pytest.raises(AssetError, match="3270 rows where 3271 are expected"):
        load_benchmark("boolq")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("helaswag",), "did you mean 'hellaswag'"), (("mmlu",), "config of mmlu = None"),
        (("mmlu", "anatomi"), "did you mean 'anatomy'"), (("boolq", None, "train"), "split of boolq none = 'train'"),
    ],
)
def test_unknown_benchmark_is_refused(arguments, said):
    with pytest.raises(SparsityError, match=said):
        benchmark_path(*arguments)


def test_every_source_has_one_role_and_known_text():
    listed = [name for role in ROLES for name in sources(role)]
    assert sorted(listed) == sorted(SOURCES) and len(set(listed)) == len(listed)
    for role in ("evaluation", "calibration"):  # reading checks count and digest against the table
        assert len(passages(role)) == sum(SOURCES[name].passages for name in sources(role))


def test_roles_share_no_passage_and_no_run_of_words():
    evaluation, calibration, training = (passages(role) for role in ROLES)
    assert len({*evaluation, *calibration, *training}) == len(evaluation) + len(calibration) + len(training)
    assert not overlapping(calibration, all_runs(evaluation))
    assert not overlapping(training, all_runs(evaluation + calibration))


def test_calibration_and_training_hold_no_benchmark_document():
    """BoolQ's splits quote the same pages: none of the evaluated passages may be left in what is learned from."""
    runs = all_runs(load_benchmark("boolq")["passage"])
    assert overlapping(texts.SOURCES["boolq-train"].read(), runs), "the raw training split does overlap"
    assert not overlapping(passages("training", "boolq-train"), runs)
    assert not overlapping(passages("calibration"), runs)


def test_overlap_sees_copies_through_markup_and_not_across_passages():
    words = [f"word{number}" for number in range(40)]
    protected = all_runs([" ".join(words), "a short one"])
    copy = "Other text. " + ", ".join(words[10 : 10 + RUN]).upper() + " and more of its own that is new"
    missed = " ".join(words[: RUN - 1]) + " other"
    halves = [" ".join(["new"] * RUN + words[:7]), " ".join(words[7:13] + ["new"] * RUN)]
    assert overlapping([copy, missed, *halves, "A short, one!", "a short one more", ""], protected) == {0, 4}
    assert overlapping(["anything"], all_runs([])) == set()


@pytest.mark.parametrize(("role", "least"), [("evaluation", 150_000), ("training", 1_000_000)])
def test_roles_have_enough_tokens(smollm2, role, least):
    assert token_sequences(smollm2, role, tokens=least, length=1000).numel() == least


def test_three_calibration_sources_have_enough_tokens(smollm2):
    assert len(sources("calibration")) >= 3
    for source in sources("calibration"):
        assert token_sequences(smollm2, "calibration", tokens=80_000, length=256, source=source).shape == (312, 256)


def test_sequences_are_reproducible_nested_and_seeded(smollm2):
    long = token_sequences(smollm2, "calibration", tokens=4096, length=64)
    assert long.shape == (64, 64) and long.dtype == torch.int64
    assert torch.equal(long[:10], token_sequences(smollm2, "calibration", tokens=640, length=64))
    assert not torch.equal(long, token_sequences(smollm2, "calibration", tokens=4096, length=64, seed=1))
    first = {name: token_sequences(smollm2, "calibration", tokens=64, length=64, source=name) for name in SOURCES
             if name in sources("calibration")}
    assert torch.equal(long[:4], torch.cat(list(first.values())))  # the sources take turns


def test_sequences_hold_the_text_and_mark_the_end_of_documents(smollm2):
    rows = token_sequences(smollm2, "calibration", tokens=2000, length=1000, source="squad")
    documents = smollm2.decode(rows.flatten().tolist()).split("<|endoftext|>")
    assert len(documents) > 5
    assert all(document in set(passages("calibration", "squad")) for document in documents[1:-1])


def test_gemma_sequences_begin_with_bos_once():
    rows = token_sequences(load_tokenizer("gemma3-270m"), "evaluation", tokens=2048, length=128, source="boolq")
    assert rows.shape == (16, 128)
    assert (rows[:, 0] == 2).all() and (rows == 2).sum() == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 10}, "tokens = 10"), ({"tokens": 64.0}, "tokens = 64.0"), ({"length": 1}, "length = 1"),
        ({"length": True}, "length = True"), ({"seed": -1}, "seed = -1"),
        ({"role": "test"}, "role = .test. is unknown"),
        ({"source": "coqa"}, "evaluation text and never used for calibration"), ({"source": "c4"}, "'c4' is unknown"),
        ({"tokens": 10**7, "source": "drop"}, r"at most 12\d{4}, all that source .drop. gives"),
    ],
)
def test_impossible_sequences_are_refused(smollm2, change, said):
    arguments = {"role": "calibration", "tokens": 256, "length": 32, **change}
    with pytest.raises(SparsityError, match=said):
        token_sequences(smollm2, arguments.pop("role"), **arguments)


def test_altered_text_in_the_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_CACHE", str(tmp_path))
    texts._passages.cache_clear()
    path = tmp_path / "texts" / f"v{texts.VERSION}" / "drop.json"
    path.parent.mkdir(parents=True)
    for content in ('["another text"]', '["half'):
        path.write_text(content)
        with pytest.raises(AssetError, match="drop.json is not the 'drop' text.*delete it"):
            passages("calibration", "drop")
    texts._passages.cache_clear()
