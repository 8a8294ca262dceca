"""Our tasks are lm-eval's own on local documents: same requests, same metrics, same scores."""

import itertools
import json
import logging
import random
import tempfile

import numpy as np
import pytest
import torch
import transformers
from datasets import DatasetDict
from lm_eval.api.metrics import mean_stderr
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sparsity_lib.assets import load_benchmark, load_model, load_tokenizer, model_path
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.bench_quiet import quiet_lm_eval
from sparsity_lib.evaluate.benchmarks import (
    FEWSHOT_SEED,
    BenchmarkResult,
    load_tasks,
    run_benchmarks,
    sampled_documents,
)
from sparsity_lib.evaluate.groups import GROUPS, resolve
from sparsity_lib.evaluate.prefix_lm import PrefixLM
from sparsity_lib.evaluate.tasks import MMLU_SUBJECTS, TASKS, stock_folder, write_tasks

FEW_SUBJECTS = ("mmlu_anatomy", "mmlu_moral_scenarios", "mmlu_us_foreign_policy")
WRITTEN = tuple(name for name, task in TASKS.items() if task.writes)
RANKED = tuple(name for name in TASKS if not name.startswith("mmlu_") and name not in WRITTEN) + FEW_SUBJECTS
ONE_OF_EACH = RANKED + WRITTEN


def test_task_files_without_room_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SparsityError, match=f"cannot write piqa.yaml in {tmp_path}/file: .*Fix: "):
        write_tasks(tmp_path / "file", ("piqa",))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(SparsityError, match=f"cannot write temporary files in {tmp_path}/gone: .*Fix: .*TMPDIR="):
        load_tasks(["piqa"])


def stock_task(name: str, monkeypatch: pytest.MonkeyPatch, shots: int = 0):
    """lm-eval's own task, from its own YAML, handed our documents where it would download its own."""
    spec = TASKS[name]

    def documents(split: str):
        data = load_benchmark(spec.benchmark, spec.config, split)
        return data.add_column("label", [int(yes) for yes in data["answer"]]) if name == "boolq" else data

    splits = {spec.stock_split: documents(spec.evaluated)}
    if name.startswith("mmlu_"):
        splits["dev"] = documents("dev")
    else:  # where lm-eval takes few-shot examples from the training split, we have another
        splits["train"] = documents(spec.extra_splits[0] if spec.extra_splits else spec.evaluated)
    splits.setdefault("validation", splits[spec.stock_split])
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda *args, **kwargs: DatasetDict(splits))
    with quiet_lm_eval():
        task = TaskManager(include_defaults=False).load(str(stock_folder() / spec.stock))["tasks"][name]
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    if task.config.process_docs is not None:  # once is enough, for the time it takes
        task.dataset[spec.stock_split] = task.task_docs
        task.set_config("process_docs", None)
    return task


def built(task, rows: list[int]) -> list:
    with quiet_lm_eval():
        task.build_all_requests(samples=rows)
    return task.instances


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(model_path("smollm2-135m-instruct")))


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """A model with a real vocabulary and hardly anything behind it: scores are near chance, and quick."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, initializer_range=0.5,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


# Few-shot prompts can be equal only where lm-eval's rule for drawing examples is the same: not where it would take them
# from a training split while it scores a test split that we do not have.
CASES = [(name, 0) for name in ONE_OF_EACH] + [
    (name, 2) for name in ONE_OF_EACH if name not in ("openbookqa", "sciq", "lambada_openai", "gsm8k")
]


@pytest.mark.parametrize(("name", "shots"), CASES)
def test_requests_and_metrics_are_those_of_the_stock_task(name, shots, monkeypatch):
    ours, theirs = load_tasks([name], {name: shots})[name], stock_task(name, monkeypatch, shots)
    rows = sampled_documents(name, len(ours.eval_docs), 5, seed=3)
    assert len(ours.eval_docs) == len(theirs.eval_docs)
    mine, stock = built(ours, rows), built(theirs, rows)
    assert [(i.args, i.doc_id, i.idx, i.request_type) for i in mine] == [(i.args, i.doc_id, i.idx, i.request_type) for i in stock]
    generator = random.Random(0)
    for doc_id, row in enumerate(rows):
        if name in WRITTEN:
            fake = [["42", "Paris", ours.doc_to_target(ours.eval_docs[row])][doc_id % 3]]
            fake = fake[0] if isinstance(fake[0], list) else fake
        else:
            fake = [(-10 * generator.random(), generator.random() < 0.5) for i in mine if i.doc_id == doc_id]
        assert ours.process_results(ours.eval_docs[row], fake) == theirs.process_results(theirs.eval_docs[row], fake)
    assert ours.aggregation().keys() == theirs.aggregation().keys() >= set(TASKS[name].metrics)
    assert [f.name for f in ours._filters] == [f.name for f in theirs._filters]
    assert TASKS[name].filter in [f.name for f in ours._filters]


def test_every_mmlu_subject_is_there_and_asks_what_lm_eval_asks(monkeypatch):
    stock = {path.stem for path in (stock_folder() / "mmlu" / "default").glob("mmlu_*.yaml")}
    assert set(resolve("mmlu")) == stock and len(MMLU_SUBJECTS) == 57
    for name, task in load_tasks(resolve("mmlu")).items():
        assert [i.args for i in built(task, [0, 7])] == [i.args for i in built(stock_task(name, monkeypatch), [0, 7])]


def test_scores_equal_lm_evals_on_the_stock_tasks(tiny, tokenizer, monkeypatch):
    results = {
        backend: run_benchmarks(tiny, tokenizer, RANKED, limit=6, seed=1, backend=backend) for backend in ("prefix", "hf")
    }
    stock = {name: stock_task(name, monkeypatch) for name in RANKED}
    rows = {name: list(task.doc_ids) for name, task in results["hf"].tasks.items()}
    with quiet_lm_eval():
        expected = evaluate(HFLM(tiny, tokenizer=tokenizer, batch_size=4), {"tasks": stock}, samples=rows, bootstrap_iters=100)
    for (backend, result), name in itertools.product(results.items(), RANKED):
        task, theirs = result.tasks[name], expected["results"][name]
        assert result.backend == backend and task.documents == 6
        assert task.available == len(load_benchmark(TASKS[name].benchmark, TASKS[name].config, TASKS[name].evaluated))
        for metric, value in task.metrics.items():
            if metric == "perplexity":
                assert value == pytest.approx(theirs["perplexity,none"], rel=1e-4)
            else:
                key = TASKS[name].filter
                assert value == theirs[f"{metric},{key}"] == np.mean(task.values[metric])
                assert task.stderr[metric] == pytest.approx(theirs[f"{metric}_stderr,{key}"])
                assert task.stderr[metric] == pytest.approx(mean_stderr(task.values[metric]))


@pytest.mark.parametrize(("model", "names", "limit"), [
    ("smollm2-135m-instruct", RANKED, 1), ("gemma3-270m", ("arc_easy", "winogrande", "mmlu_anatomy"), 1),
])
def test_real_models_score_alike_packed_and_through_hflm(model, names, limit):
    loaded, tokenizer = load_model(model)
    lm = PrefixLM(loaded, tokenizer)
    assert lm.packed, lm.why_not_packed
    requests = []
    for name, task in load_tasks(names).items():
        requests += built(task, sampled_documents(name, len(task.eval_docs), limit, seed=2))
    if tokenizer.bos_token_id is not None and model.startswith("gemma"):
        assert lm.tok_encode(requests[0].args[0])[0] == tokenizer.bos_token_id
    ours, theirs = lm.loglikelihood(requests), HFLM(loaded, tokenizer=tokenizer, batch_size=2).loglikelihood(requests)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True)) < 1e-3
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_fewshot_counts_reach_the_prompts_they_name():
    shots = {"mmlu_anatomy": 5, "arc_easy": 1}
    for name, task in load_tasks([*shots, "piqa"], shots).items():
        prompt = built(task, [11])[0].args[0]
        assert prompt.count("Answer:") == shots.get(name, 0) + 1


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if not TASKS[name].extra_splits])
def test_a_document_is_never_among_its_own_examples(name):
    task = load_tasks([name], {name: 5})[name]
    documents = [task.eval_docs[row] for row in range(0, 60, 10)]  # neighbours can be twins
    task.sampler.replace_df(documents)
    for document in documents:
        alone, prompt = (task.fewshot_context(document, shots) for shots in (0, 5))
        texts = [alone, prompt] if isinstance(alone, str) else [alone[0], prompt[0]]
        assert texts[1].endswith(texts[0]) and texts[1].count(texts[0]) == 1 and len(texts[1]) > 2 * len(texts[0])


def test_limits_draw_a_random_nested_sample_by_task():
    small, large = sampled_documents("piqa", 1000, 20, 0), sampled_documents("piqa", 1000, 200, 0)
    assert set(small) < set(large) and small == sorted(small) and small != list(range(20))
    assert small != sampled_documents("piqa", 1000, 20, 1) and small != sampled_documents("boolq", 1000, 20, 0)
    assert sampled_documents("piqa", 30, None, 0) == sampled_documents("piqa", 30, 99, 0) == list(range(30))


def test_results_survive_json(tiny, tokenizer):
    result = run_benchmarks(tiny, tokenizer, ["piqa", "lambada_openai"], limit=1, num_fewshot={"piqa": 1})
    assert np.isnan(result.tasks["piqa"].stderr["acc"]) and result.tasks["piqa"].num_fewshot == 1
    again = BenchmarkResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.to_dict() == result.to_dict() and again.tasks["piqa"].doc_ids == result.tasks["piqa"].doc_ids
    with pytest.raises(SparsityError, match="not a saved benchmark result"):
        BenchmarkResult.from_dict({"tasks": {"piqa": {}}})


def test_nothing_is_printed_but_our_own_bar(tiny, tokenizer, capfd, caplog, monkeypatch):
    monkeypatch.setenv("SPARSITY_PROGRESS", "0")
    with caplog.at_level(logging.WARNING):
        run_benchmarks(tiny, tokenizer, ["hellaswag", "mmlu_anatomy"], limit=2)
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize(("options", "message"), [
    ({"tasks": "hellasweg"}, "hellaswag"), ({"tasks": ["piqa", "avg6"]}, "avg5"), ({"tasks": "mmlu_anatomi"}, "mmlu_anatomy"),
    ({"tasks": []}, "at least one"), ({"limit": 0}, "limit"), ({"limit": 1.5}, "limit"), ({"limit": True}, "limit"),
    ({"num_fewshot": -1}, "num_fewshot"), ({"num_fewshot": {"boolq": 1}}, "boolq"), ({"backend": "vllm"}, "prefix"),
    ({"num_fewshot": 6, "tasks": "mmlu_anatomy"}, "at most 5"), ({"seed": -1}, "seed"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"batch_tokens": 1}, "batch_tokens"),
])
def test_bad_input_is_refused_at_the_door(options, message, tiny, tokenizer):
    with pytest.raises(SparsityError, match=message):
        run_benchmarks(tiny, tokenizer, **{"tasks": "piqa", "limit": 1, **options})


def test_groups_name_known_tasks_and_metrics():
    for group in GROUPS.values():
        for member, metric in group.members:
            assert member in GROUPS or metric in TASKS[member].metrics
    assert len(resolve(["avg5", "mmlu", "scap7"])) == 5 + 57 + 2
    assert [len(GROUPS[name].members) for name in ("avg5", "scap7", "cwic7", "cwic7-flops")] == [5, 7, 7, 7]


@pytest.mark.parametrize("name", WRITTEN)
def test_written_answers_are_scored_by_document(name, tiny, tokenizer, monkeypatch):
    asked = []

    def write(self, requests, disable_tqdm=False):
        asked.extend(requests)
        answers = [request.doc["answer"] for request in requests]
        right = [a["aliases"][0] if isinstance(a, dict) else f"so it is\n#### {a.rsplit(' ', 1)[1]}" for a in answers]
        return [text if i % 3 else "Nobody knows, say 1234567" for i, text in enumerate(right)]

    monkeypatch.setattr(HFLM, "generate_until", write)
    result = run_benchmarks(tiny, tokenizer, name, limit=6, num_fewshot=2)
    assert result.tasks[name].values["exact_match"] == tuple(float(i % 3 > 0) for i in range(6))
    assert result.score(name).mean == pytest.approx(4 / 6) and result.score(name).stderr > 0
    assert all(request.args[0].count("Answer:") == 3 for request in asked)


def test_an_answer_can_be_cut(tiny, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **k: asked.extend(requests) or ["?"] * len(requests))
    run_benchmarks(tiny, tokenizer, ["triviaqa", "piqa"], limit=2, max_new_tokens=7)
    run_benchmarks(tiny, tokenizer, "triviaqa", limit=1)
    assert [request.args[1].get("max_gen_toks") for request in asked] == [7, 7, None]
    assert all(request.args[1]["until"] for request in asked)


def test_a_model_writes_until_the_task_says_stop(tiny, tokenizer):
    result = run_benchmarks(tiny, tokenizer, "triviaqa", limit=2)
    assert result.tasks["triviaqa"].documents == 2 and set(result.tasks["triviaqa"].values["exact_match"]) <= {0.0, 1.0}
