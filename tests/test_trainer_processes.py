"""Training across processes: killed without warning, and shared by two."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from core_tiny import tiny, tokens
from processes import start

from sparsity_lib.train import TrainRecipe, train
from sparsity_lib.train.checkpoints import steps_in
from sparsity_lib.train.losses import next_token

TESTS = Path(__file__).parent
RECIPE = {"steps": 12, "batch": 4, "learning_rate": 1e-2, "warmup": 2, "weight_decay": 0.1}
CHILD = f"""
import json, os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
import conftest, torch
from core_tiny import tiny, tokens
from sparsity_lib.train import TrainRecipe, train
from sparsity_lib.train.losses import next_token
kind, folder, recipe = sys.argv[1], sys.argv[2], TrainRecipe(**json.loads(sys.argv[3]))

def die(module, step):
    if kind == "killed" and step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

model = tiny("mixtral")
made = train(model, next_token, tokens(48), recipe, checkpoints=folder, every=3, after=die)
if int(os.environ.get("RANK", 0)) == 0:
    print(json.dumps([made.losses, made.seen, float(model.lm_head.weight.double().sum())]))
"""


def expected():
    model = tiny("mixtral")
    made = train(model, next_token, tokens(48), TrainRecipe(**RECIPE))
    return model, made


def test_a_killed_process_loses_nothing_but_time(tmp_path):
    child = start("-c", CHILD, "killed", str(tmp_path), json.dumps(RECIPE))
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    assert steps_in(tmp_path)[-1] == 6
    model, whole = tiny("mixtral"), expected()
    made = train(model, next_token, tokens(48), TrainRecipe(**RECIPE), checkpoints=tmp_path, every=3)
    assert made.resumed == 6 and made.losses == whole[1].losses
    assert torch.equal(model.lm_head.weight, whole[0].lm_head.weight)


@pytest.mark.parametrize("accumulation", [2])
def test_two_processes_train_what_one_does(tmp_path, accumulation):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    recipe = json.dumps({**RECIPE, "accumulation": accumulation})
    port = str(20_000 + int(time.time() * 1000) % 20_000)
    run = start(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", port, str(script), "whole",
        str(tmp_path / "run"), recipe,
    )
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    losses, seen, total = json.loads(out.strip().splitlines()[-1])
    model, whole = expected()
    assert seen == whole.seen and losses == pytest.approx(whole.losses, rel=1e-4)
    assert total == pytest.approx(float(model.lm_head.weight.detach().double().sum()), rel=1e-3)
    assert steps_in(tmp_path / "run") == [9, 12]
