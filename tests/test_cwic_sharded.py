"""Weights split between two processes: what one process computes, in the same files, killed or not."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from core_tiny import tiny, tokens
from processes import together
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from sparsity_lib import SparsityError
from sparsity_lib.cwic import CWICConfig, CWICRecipe, budget, command, convert, registry_of, teacher_of, train_cwic
from sparsity_lib.cwic.history import LOG
from sparsity_lib.train import TrainRecipe
from sparsity_lib.train.checkpoints import latest, path_of, steps_in
from sparsity_lib.train.sharding import is_split, shard, whole

TESTS = Path(__file__).parent
STEPS = 6
TOY = {**command.read("toy"), "length": 32, "shard": True,
       "train": {"steps": 3, "batch": 4, "accumulation": 2, "learning_rate": 1e-3, "passes": 4}}
#: 61 tokens, and thresholds of one row, come out odd; a head of its own and blocks computed twice; bfloat16; clipped gradients.
#: Clipping and accumulation add up in another order, after which rounding flips a mask's entry sooner or later: two steps.
VARIANTS = {
    "tied": ({"tie_word_embeddings": True}, {"weight_decay": 0.1}, {}),
    "untied": ({"tie_word_embeddings": False}, {}, {"mse": 0.5}),
    "bf16": ({"tie_word_embeddings": True}, {"precision": "bf16"}, {}),
    "clipped": ({"tie_word_embeddings": True},
                {"steps": 2, "warmup": 1, "clip": 0.05, "weight_decay": 0.1, "accumulation": 2}, {}),
}
CHILD = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import conftest
from test_cwic_sharded import child

child(sys.argv[1], sys.argv[2])
"""


def run(name="tied", folder=None, on_step=None, split=True):
    shape, train, options = VARIANTS[name]
    model, teacher = tiny("llama", **shape), teacher_of(tiny("llama", seed=1, **shape))
    if name == "bf16":
        teacher.to(torch.bfloat16)
    convert(model, CWICConfig(stripe={"q": 16, "gate": 12}, momentum=0.9))
    if name == "untied":
        model.activation_checkpointing_enable({"use_reentrant": False})
    plain = {"steps": STEPS, "batch": 4, "learning_rate": 5e-3, "warmup": 2, "clip": 1e9, "passes": 6, **train}
    recipe = CWICRecipe(TrainRecipe(**plain), budget.active(STEPS, final=2.0), eta=2.0, **options)
    made = train_cwic(model, teacher, tokens(4, 12), recipe, checkpoints=folder, every=2, on_step=on_step, shard=split)
    return model, teacher, made


def told(made):
    return [[value or 0.0 for value in dataclasses.astuple(dataclasses.replace(r, tokens_per_second=0.0))] for r in made.history]


def die(record, model):
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def plain_size(parameter):
    """Numbers that this process holds of it."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


def child(what, folder):
    """What each of two processes does."""
    folder, rank = Path(folder), int(os.environ["RANK"])
    if what == "first":
        found = {}
        for name in VARIANTS:
            model, teacher, made = run(name)
            model.save_pretrained(folder / name)
            held = [sum(plain_size(p) for p in m.parameters()) / sum(p.numel() for p in m.parameters()) for m in (model, teacher)]
            whole, _, again = run(name, split=False)
            whole.save_pretrained(folder / f"{name}-whole")
            found[name] = [told(made), told(again), held]
        found["command"] = told(command.distilled(TOY, None, folder / "command"))
        if rank == 0:
            print(json.dumps(found), flush=True)
    made = run(folder=folder / "killed", on_step=die if what == "first" else None)[2]
    if rank == 0:
        print(json.dumps([made.run.resumed, told(made)]), flush=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two processes twice: for all variants, and one run that is killed; and for what goes on from there."""
    folder = tmp_path_factory.mktemp("split")
    script = folder / "child.py"
    script.write_text(CHILD)
    first = together(2, str(script), "first", str(folder))
    out, errors = first.communicate(timeout=600)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert lines, errors
    assert first.returncode != 0 and steps_in(folder / "killed") == [2, 4], errors
    second = together(2, str(script), "again", str(folder))
    out, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    return folder, json.loads(lines[-1]), json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize("name", ["tied", "untied", "clipped"])
def test_two_processes_with_split_weights_train_what_one_does(split, name):
    """Losses, until rounding may have flipped a mask's entry; for weights and later steps, the next test has the same halves."""
    _, found, _ = split
    model, teacher, made = run(name)  # one process splits nothing
    assert not is_split(model) and not is_split(teacher)
    assert len(found[name][0]) == len(made.history)
    for values, expected in zip(found[name][0][:3], told(made)[:3], strict=True):
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert made.history[-1].ratio > 1.02 and made.history[-1].kl != pytest.approx(made.history[0].kl, rel=0.05)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_saved_model_is_that_of_two_processes_with_whole_weights(split, name):
    folder, found, _ = split
    records, whole, held = found[name]
    for values, expected in zip(records, whole, strict=True):
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert held[0] < 0.56, "each process holds about half of the student"
    assert held[1] < 0.8, "and half of the teacher's blocks"
    again, expected = (
        AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float32) for n in (name, f"{name}-whole"))
    assert registry_of(again).config == registry_of(expected).config
    assert again.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in again.state_dict().items():
        torch.testing.assert_close(
            tensor, expected.state_dict()[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    with safe_open(folder / name / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is (name == "untied")  # tied weights are written once
    assert sorted(p.suffix for p in (folder / name).iterdir()) == [".json", ".json", ".safetensors"]
    for key, theta in registry_of(again).thresholds().items():
        assert float(theta.detach().min()) >= 0 and float(theta.detach().max()) > 0, key


def test_a_killed_run_goes_on_with_the_very_losses_it_would_have_had(split):
    folder, found, (resumed, records) = split
    assert resumed == 4 and records == found["tied"][0]
    lines = (folder / "killed" / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))


def test_checkpoints_are_those_of_one_process(split, tmp_path):
    """Whole tensors, those of the saved model, which one process goes on from as well as two."""
    folder, found, _ = split
    expected = AutoModelForCausalLM.from_pretrained(folder / "tied", dtype=torch.float32).state_dict()
    saved = latest(folder / "killed")
    assert saved.step == STEPS and expected.keys() - saved.state.keys() == {"lm_head.weight"}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in saved.state.items())
    assert all(not key.endswith("exp_avg_sq") or float(m.min()) >= 0 for key, m in saved.moments.items())
    shutil.copytree(folder / "killed", tmp_path / "run")
    shutil.rmtree(path_of(tmp_path / "run", STEPS))
    _, _, again = run(folder=tmp_path / "run")
    assert again.run.resumed == 4 and again.run.losses == pytest.approx([r[1] for r in found["tied"][0]], rel=1e-3)


def test_the_command_splits_what_its_recipe_says(split, tmp_path):
    folder, found, _ = split
    alone = command.distilled({**TOY, "train": {**TOY["train"], "accumulation": 1}}, None, tmp_path)  # two share two pieces
    assert [r[1] for r in found["command"]] == pytest.approx([r.loss for r in alone.history], rel=2e-3, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder / "command" / "model")
    assert registry_of(model).config.stripe == 32 and (folder / "command" / "model" / "tokenizer.json").exists()


def test_frozen_weights_are_not_split():
    model = tiny("llama")
    teacher = teacher_of(model, share=True)
    convert(model, CWICConfig(stripe={"q": 16, "gate": 12}))
    recipe = CWICRecipe(TrainRecipe(steps=2, batch=2, learning_rate=1e-3), budget.active(2, final=2.0), mode="lora")
    with pytest.raises(SparsityError, match='shard = True is not allowed.*mode "lora"'):
        train_cwic(model, teacher, tokens(4, 12), recipe, shard=True)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 3)


def test_modules_that_cannot_be_split_say_why():
    cpu = torch.device("cpu")
    with pytest.raises(SparsityError, match="Pair has no blocks"):
        shard(Pair(), [], cpu)
    for change, said in (
        (lambda m: setattr(m.blocks[1], "weight", m.blocks[0].weight), "weight belongs to two blocks"),
        (lambda m: setattr(m.head, "weight", m.blocks[0].weight), "head.weight is also in a block"),
        (lambda m: setattr(m.head, "bias", nn.Parameter(torch.tensor(1.0))), "head.bias is a single number"),
        (lambda m: m.head.double(), "torch.float32, torch.float64"),
    ):
        made = Pair()
        change(made)
        with pytest.raises(SparsityError, match=said):
            shard(made, list(made.blocks), cpu)


def test_gathering_keeps_ties_and_leaves_others_empty():
    made = Pair()
    made.head.weight = made.blocks[0].weight
    found = whole(made.state_dict(keep_vars=True))
    assert found["head.weight"] is found["blocks.0.weight"] and torch.equal(found["head.bias"], made.head.bias)
    assert whole(made.state_dict(), keep=False) == {}
