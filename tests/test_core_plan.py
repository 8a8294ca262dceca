"""Plans: files that come back whole, or are refused; folders that hold nothing half-written."""

import builtins
import errno
import json
import os

import pytest
import torch
from core_tiny import outputs, tiny, tokens
from safetensors.torch import save_file

from sparsity_lib import Plan, SparsityError, fit, fit_many, install, recipes, sealed, uninstall
from sparsity_lib import plan as plan_module

IDS = tokens()
MAKERS = [recipes.cats(0.4), recipes.claws(0.4, variant="median"), recipes.larosa(0.4), recipes.gate_topk(0.4)]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def plans(model):
    return fit_many(MAKERS, model, ids=IDS)


@pytest.fixture
def saved(plans, tmp_path):
    return plans[0].save(tmp_path / "cats.safetensors")


@pytest.mark.parametrize("number", range(len(MAKERS)), ids=[m.method for m in MAKERS])
def test_round_trip(model, plans, tmp_path, number):
    plan = plans[number]
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    assert (again.recipe, dict(again.widths), again.calibration) == (plan.recipe, dict(plan.widths), plan.calibration)
    assert again.tensors.keys() == plan.tensors.keys()
    for name, tensor in plan.tensors.items():
        assert again.tensors[name].dtype == torch.float32 and torch.equal(again.tensors[name], tensor)
    logits = [outputs(install(model, p)) for p in (plan, again) if uninstall(model) is model]
    uninstall(model)
    assert torch.equal(*logits)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_saving_again_replaces_the_file_whole(plans, saved):
    plans[2].save(saved)
    assert Plan.load(saved).recipe == plans[2].recipe and len(list(saved.parent.iterdir())) == 1


def refused(path):
    with pytest.raises(SparsityError) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    refused(saved)


def test_any_flipped_bit_is_refused(saved):
    """In the header and in the numbers: there is a checksum."""
    whole = saved.read_bytes()
    for byte in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[byte] ^= 1 << (byte % 8)
        saved.write_bytes(bytes(broken))
        refused(saved)
    saved.write_bytes(whole)
    Plan.load(saved)


def write(path, **meta):
    """A file whose checksum is right, so that it is refused for what is tested."""
    sealed.write(path, {"0.gate.threshold": torch.ones(1)}, meta)
    return path


GOOD = {
    "format": plan_module.FORMAT, "recipe": recipes.cats().dumps(), "calibration": "{}",
    "widths": json.dumps({"0.gate": 48, "1.gate": 48}),
}


@pytest.mark.parametrize("changes", [
    {"format": "pt"}, {"format": "sparsity-plan-9"}, {"recipe": ""}, {"recipe": "{"}, {"recipe": "[]"}, {"widths": "{"},
    {"widths": "[]"}, {"widths": "3"}, {"widths": "null"}, {"widths": '{"gate": 48}'}, {"widths": '{"0.gate": "48"}'},
    {"widths": "[" * 100_000}, {"calibration": "]"}, {"calibration": "[1]"}, {"calibration": "null"},
], ids=lambda c: str(c)[:40])
def test_broken_metadata_is_refused(tmp_path, changes):
    with pytest.raises(SparsityError):
        Plan.load(write(tmp_path / "x.safetensors", **{**GOOD, **changes}))


def test_a_checksum_is_asked_for(tmp_path):
    Plan.load(write(tmp_path / "x.safetensors", **GOOD))
    save_file({"0.gate.threshold": torch.ones(1)}, tmp_path / "y.safetensors", metadata=GOOD)
    with pytest.raises(SparsityError, match="has no checksum"):
        Plan.load(tmp_path / "y.safetensors")
    save_file({"0.gate.threshold": torch.ones(1)}, tmp_path / "z.safetensors", metadata={**GOOD, sealed.SEAL: "0" * 64})
    with pytest.raises(SparsityError, match="was damaged"):
        Plan.load(tmp_path / "z.safetensors")


@pytest.mark.parametrize("missing", GOOD)
def test_missing_metadata_is_refused(tmp_path, missing):
    with pytest.raises(SparsityError):
        Plan.load(write(tmp_path / "x.safetensors", **{k: v for k, v in GOOD.items() if k != missing}))


def test_foreign_files_are_refused(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(3)}, foreign)
    refused(foreign)
    for content in (b"", b"{}", b'{"recipe": 1}', os.urandom(64), b"\xff" * 64):
        foreign.write_bytes(content)
        refused(foreign)
    refused(tmp_path)
    refused(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("changes", [{"intermediate_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_a_model_of_another_shape_is_refused_untouched(plans, changes):
    other = tiny("llama", **changes)
    before = outputs(other)
    with pytest.raises(SparsityError, match="fit the recipe to this model"):
        install(other, plans[0])
    assert torch.equal(outputs(other), before)
    uninstall(install(other, fit(recipes.cats(), other, ids=IDS)))


@pytest.mark.parametrize("spoil", [lambda t: None, lambda t: t[:-1], lambda t: t[None]], ids=["absent", "short", "deep"])
def test_a_tensor_that_is_absent_or_misshapen_is_refused(model, plans, spoil):
    tensors = dict(plans[1].tensors)
    changed = spoil(tensors.pop("1.gate.saliency"))
    tensors.update({} if changed is None else {"1.gate.saliency": changed})
    with pytest.raises(SparsityError, match="1.gate.saliency"):
        install(model, Plan(plans[1].recipe, tensors, plans[1].widths))


def test_a_threshold_keeps_its_density_and_a_top_k_changes_it(model, plans):
    cats, claws = plans[0], plans[1]
    with pytest.raises(SparsityError, match=r"threshold of site 'gate'.*with_density\(0.2\)"):
        cats.with_density(0.2)
    assert claws.with_density(0.2).recipe == recipes.claws(0.2, variant="median")
    assert claws.with_density(0.2).tensors is claws.tensors
    with pytest.raises(SparsityError, match="density = 2"):
        claws.with_density(2)


def test_a_folder_that_does_not_exist_is_a_clear_error(plans, tmp_path):
    with pytest.raises(SparsityError, match="could not be written"):
        plans[0].save(tmp_path / "absent" / "plan.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_folders_place_is_a_clear_error(plans, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SparsityError, match="could not be written"):
        plans[0].save(tmp_path / "file" / "plan.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SparsityError, match="could not be written"):
        plans[0].save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "read-only"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=["full disk", "read-only", "Ctrl-C"])
@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(plans, saved, monkeypatch, error, moment):
    whole = saved.read_bytes()

    def half(tensors, path, metadata=None):
        with builtins.open(path, "wb") as file:
            file.write(b"half")
        raise error

    def refuse(*args):
        raise error

    if moment == "writing":
        monkeypatch.setattr(sealed, "save_file", half)
    else:
        monkeypatch.setattr(sealed.os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SparsityError):
        plans[2].save(saved)
    assert saved.read_bytes() == whole and [p.name for p in saved.parent.iterdir()] == [saved.name]
