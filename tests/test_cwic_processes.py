"""Two processes train a granular model as one does: the budget and the statistics are those of the whole batch."""

import json
from pathlib import Path

import pytest
from core_tiny import tiny, tokens
from processes import together

from sparsity_lib.cwic import CWICConfig, CWICRecipe, budget, convert, teacher_of, train_cwic
from sparsity_lib.train import TrainRecipe

TESTS = Path(__file__).parent
CHILD = f"""
import json, os, sys
sys.path.insert(0, {str(TESTS)!r})
import conftest
from torch import distributed as dist
from test_cwic_processes import run

made = run()
assert dist.get_world_size() == 2
if int(os.environ.get("RANK", 0)) == 0:
    print(json.dumps([[r.loss, r.kl, r.ratio, r.head_ratio, r.tokens] for r in made.history]))
"""


def run():
    # A teacher of other weights: gradients of no divergence are rounding, of which AdamW makes steps of full size.
    model, teacher = tiny("llama"), teacher_of(tiny("llama", seed=1))
    convert(model, CWICConfig(stripe={"q": 16, "gate": 12}))
    recipe = TrainRecipe(steps=5, batch=4, learning_rate=5e-3, passes=5)
    return train_cwic(model, teacher, tokens(4, 12), CWICRecipe(recipe, budget.flops(5, final=2.0, head_limit=None)))


def test_two_processes_train_what_one_does(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    child = together(2, str(script))
    out, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors
    found, alone = json.loads(out.strip().splitlines()[-1]), run().history
    assert alone[-1].ratio > 1.02
    for values, record in zip(found, alone, strict=True):
        expected = [record.loss, record.kl, record.ratio, record.head_ratio, record.tokens]
        assert values == pytest.approx(expected, rel=2e-3, abs=1e-5)
