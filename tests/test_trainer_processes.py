"""Training across processes: killed without warning, and shared by two."""

import json
import signal
from pathlib import Path

import pytest
import torch
from core_tiny import tiny, tokens
from processes import start, together

from sparsity_lib.train import TrainRecipe, train
from sparsity_lib.train.checkpoints import steps_in
from sparsity_lib.train.losses import next_token

TESTS = Path(__file__).parent
RECIPE = {"steps": 12, "batch": 4, "learning_rate": 1e-2, "warmup": 2, "weight_decay": 0.1}
CHILD = f"""
import json, os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
import conftest, torch
from accelerate import Accelerator
from core_tiny import tiny, tokens
from sparsity_lib.train import TrainRecipe, train
from sparsity_lib.train.losses import next_token
kind, folder, recipe = sys.argv[1], sys.argv[2], TrainRecipe(**json.loads(sys.argv[3]))
rank = os.environ.get("RANK", "0")
open(".".join([folder, rank, str(os.getpid())]), "w").close()

def die(module, step):
    if kind in ("killed", "killed " + rank) and step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

model = tiny("mixtral")
made = train(model, next_token, tokens(48), recipe, checkpoints=folder, every=3, after=die)
if rank == "0":
    total = float(model.lm_head.weight.double().sum())
    print(json.dumps([made.losses, made.seen, total, Accelerator().num_processes, made.resumed]))
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
    run = together(2, str(script), "whole", str(tmp_path / "run"), recipe)
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    losses, seen, total, processes, _ = json.loads(out.strip().splitlines()[-1])
    model, whole = expected()
    assert processes == 2 and seen == whole.seen and losses == pytest.approx(whole.losses, rel=1e-4)
    assert total == pytest.approx(float(model.lm_head.weight.detach().double().sum()), rel=1e-3)
    assert steps_in(tmp_path / "run") == [9, 12]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_that_is_killed_ends_both_and_loses_nothing_but_time(tmp_path, rank):
    """No process is left, and the same command goes on from the last checkpoint with the losses of an undisturbed run."""
    script, folder = tmp_path / "child.py", tmp_path / "run"
    script.write_text(CHILD)

    def run(kind):
        out, errors = (process := together(2, str(script), kind, str(folder), json.dumps(RECIPE))).communicate(timeout=120)
        return process.returncode, out, errors

    code, _, errors = run(f"killed {rank}")
    assert code == 1 and f"exitcode  : {-signal.SIGKILL}" in errors and steps_in(folder)[-1] == 6
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("run.*.*")]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    code, out, errors = run("whole")
    assert code == 0, errors
    losses, _, _, processes, resumed = json.loads(out.strip().splitlines()[-1])
    assert processes == 2 and resumed == 6 and losses == pytest.approx(expected()[1].losses, rel=1e-4)
