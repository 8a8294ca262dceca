"""Weights split between two processes: what one process computes, in the same files, killed or not."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from core_tiny import tiny, tokens
from processes import start
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
#: Clipped gradients (61 tokens, and thresholds of one row, come out odd); a head of its own and blocks computed twice; bfloat16.
VARIANTS = {
    "tied": ({"tie_word_embeddings": True}, {"clip": 0.05, "weight_decay": 0.1}, {}),
    "untied": ({"tie_word_embeddings": False}, {"accumulation": 1}, {"mse": 0.5}),
    "bf16": ({"tie_word_embeddings": True}, {"precision": "bf16"}, {}),
}
CHILD = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import conftest
from test_cwic_sharded import child

child(sys.argv[1], sys.argv[2])
"""


def run(name="tied", folder=None, on_step=None):
    shape, train, options = VARIANTS[name]
    model, teacher = tiny("llama", **shape), tiny("llama", seed=1, **shape)
    if name == "bf16":
        teacher.to(torch.bfloat16)
    convert(model, CWICConfig(stripe={"q": 16, "gate": 12}, momentum=0.9))
    if name == "untied":
        model.activation_checkpointing_enable({"use_reentrant": False})
    plain = {"steps": STEPS, "batch": 4, "learning_rate": 5e-3, "warmup": 2, "accumulation": 2, "passes": 6, **train}
    recipe = CWICRecipe(TrainRecipe(**plain), budget.active(STEPS, final=2.0), eta=2.0, **options)
    made = train_cwic(model, teacher, tokens(4, 12), recipe, checkpoints=folder, every=2, on_step=on_step, shard=True)
    return model, teacher, made


def told(made):
    return [dataclasses.astuple(dataclasses.replace(r, tokens_per_second=0.0)) for r in made.history]


def die(record, model):
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def child(what, folder):
    """What each of two processes does."""
    folder, rank = Path(folder), int(os.environ["RANK"])
    if what == "first":
        found = {}
        for name in VARIANTS:
            model, teacher, made = run(name)
            held = [sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in m.parameters())
                    for m in (model, teacher)]
            found[name] = [told(made), held, [sum(p.numel() for p in m.parameters()) for m in (model, teacher)]]
            model.save_pretrained(folder / name)
        found["command"] = told(command.distilled(TOY, None, folder / "command"))
        if rank == 0:
            print(json.dumps(found), flush=True)
    made = run(folder=folder / "killed", on_step=die if what == "first" else None)[2]
    if rank == 0:
        print(json.dumps([made.run.resumed, told(made)]), flush=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two processes: by torchrun all variants, and one run that is killed; by accelerate, what goes on from there."""
    folder = tmp_path_factory.mktemp("split")
    script = folder / "child.py"
    script.write_text(CHILD)
    port = str(20_000 + int(time.time() * 1000) % 20_000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    first = start(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, str(script), "first", str(folder),
        env=environment)
    out, errors = first.communicate(timeout=600)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert lines, errors
    assert first.returncode != 0 and "SIGKILL" in errors and steps_in(folder / "killed") == [2, 4]
    second = start(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", str(int(port) + 1), str(script),
        "again", str(folder))
    out, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    return folder, json.loads(lines[-1]), json.loads(out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    return {name: run(name) for name in VARIANTS}  # one process splits nothing


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_with_split_weights_train_what_one_does(split, alone, name):
    _, found, _ = split
    records, held, everything = found[name]
    model, teacher, made = alone[name]
    assert not is_split(model) and not is_split(teacher)
    rounding = 2e-2 if name == "bf16" else 1e-4
    for values, expected in zip(records, told(made), strict=True):
        assert values == pytest.approx(list(expected), rel=rounding, abs=1e-6)
    assert made.history[-1].ratio > 1.02 and made.history[-1].kl != pytest.approx(made.history[0].kl, rel=0.05)
    assert everything[0] == sum(p.numel() for p in model.parameters())
    assert held[0] < 0.56 * everything[0], "each process holds about half of the student"
    assert held[1] < 0.8 * everything[1], "and half of the teacher's blocks"


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_saved_model_is_that_of_one_process(split, alone, name):
    folder, _, _ = split
    model = alone[name][0]
    again, expected = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32), model.state_dict()
    assert registry_of(again).config == registry_of(model).config
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
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


def test_checkpoints_are_those_of_one_process(split, alone, tmp_path):
    """What two wrote with split weights, one reads, and the other way round: nothing in them tells how they were made."""
    folder, _, _ = split
    model, _, made = alone["tied"]
    saved, expected = latest(folder / "killed"), model.state_dict()
    assert saved.step == STEPS and saved.state.keys() <= expected.keys()
    for key, tensor in saved.state.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert all(not key.endswith("exp_avg_sq") or float(m.min()) >= 0 for key, m in saved.moments.items())
    shutil.copytree(folder / "killed", tmp_path / "run")
    shutil.rmtree(path_of(tmp_path / "run", STEPS))
    _, _, again = run(folder=tmp_path / "run")
    assert again.run.resumed == 4 and again.run.losses == pytest.approx(made.run.losses, rel=1e-4)


def test_the_command_splits_what_its_recipe_says(split, tmp_path):
    folder, found, _ = split
    alone = command.distilled(TOY, None, tmp_path)
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
