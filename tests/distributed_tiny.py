"""What each of several processes evaluates (`test_distributed`): python distributed_tiny.py FOLDER, by torchrun."""

import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401 - its threads
import torch
import transformers
from core_tiny import tiny, tokens

from sparsity_lib import SparsityError, distributed, fit, progress, recipes
from sparsity_lib.assets import load_tokenizer, model_path
from sparsity_lib.evaluate.benchmarks import run_benchmarks
from sparsity_lib.evaluate.quality import evaluate, evaluate_other, evaluate_pair

CASES = ("plans", "fewer than processes", "other", "pair", "ranked answers", "ranked answers, plainly", "written answers")


def found() -> dict:
    """By case what was found, and how much this process did for it."""
    model, other = tiny("llama"), tiny("llama", seed=1)
    plan = fit(recipes.cats(0.3), model, ids=tokens(3, 12))
    ids, forwards = tokens(5, 12), []
    hook = model.model.register_forward_hook(lambda *_: forwards.append(1))
    plans = evaluate(model, {"cats": plan}, ids, batch_size=2, every=3)
    hook.remove()
    other.set_output_embeddings(model.get_output_embeddings())
    tokenizer = load_tokenizer(str(model_path("smollm2-135m-instruct")))
    small, read = scored(tokenizer), []
    small.model.register_forward_pre_hook(
        lambda _, args, options: read.append(_size(args, options)), with_kwargs=True)

    def benchmark(task, **options):
        result = run_benchmarks(small, tokenizer, task, **options).tasks[task]
        return {"metrics": result.metrics, "values": result.values, "documents": result.doc_ids}

    cases = {
        "plans": {name: quality.to_json() for name, quality in plans.items()},
        "fewer than processes": evaluate(model, {"cats": plan}, ids[:1])["cats"].to_json(),
        "other": evaluate_other(model, other, ids, batch_size=2).to_json(),
        "pair": evaluate_pair(model, other, plan, ids).to_json(),
        "ranked answers": benchmark("piqa", limit=12, num_fewshot=1),
        "ranked answers, plainly": benchmark("piqa", limit=3, backend="hf"),
        "written answers": benchmark("triviaqa", limit=5, max_new_tokens=3),
    }
    return cases | {"forwards": len(forwards), "read": sum(read)}


def scored(tokenizer) -> transformers.PreTrainedModel:
    """A model with a real vocabulary and hardly anything behind it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, initializer_range=0.5)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _size(args, options) -> int:
    given = args[0] if args else options.get("input_ids")
    return (given if given is not None else options["inputs_embeds"][..., 0]).numel()


if __name__ == "__main__":
    os.environ[progress.SWITCH] = "1"  # conftest turns bars off
    with distributed() as ranks:
        outcome = found() | {"bars": progress.shown()}
        try:
            evaluate(tiny("llama"), {}, tokens(2, seed=ranks.index))
        except SparsityError as error:
            outcome["differs"] = str(error)
        assert ranks.index == int(os.environ["RANK"])
        (Path(sys.argv[1]) / f"{ranks.index}.json").write_text(json.dumps(outcome))
