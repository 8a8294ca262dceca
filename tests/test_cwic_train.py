"""Training granular models: thresholds are learnt, runs resume exactly, files load back, and everything read is counted."""

import dataclasses
import json

import pytest
import torch
from core_tiny import tiny, tokens
from transformers import AutoModelForCausalLM

from sparsity_lib import SparsityError, account
from sparsity_lib.cwic import (
    CWICConfig,
    CWICRecipe,
    budget,
    convert,
    load_thresholds,
    measure,
    registry_of,
    save_thresholds,
    teacher_of,
    train_cwic,
)
from sparsity_lib.cwic.adapters import add_adapters, merge_adapters
from sparsity_lib.cwic.history import LOG
from sparsity_lib.cwic.layers import CWICLinear
from sparsity_lib.train import TrainRecipe
from sparsity_lib.train.checkpoints import alone
from sparsity_lib.train.packing import pack

STEPS = 8
TRAIN = TrainRecipe(steps=STEPS, batch=2, learning_rate=3e-3, warmup=1, passes=10, seed=3)
RECIPE = CWICRecipe(TRAIN, budget.active(STEPS, final=2.0), eta=2.0)
CONFIG = CWICConfig(stripe={"q": 16, "k": 8, "v": 8, "o": 16, "gate": 12}, momentum=0.9)
DATA = tokens(8, 12)


def run(recipe=RECIPE, data=DATA, config=CONFIG, **options):
    model = tiny("llama", tie_word_embeddings=True)
    teacher = teacher_of(model, share=recipe.mode != "all")
    convert(model, config)
    return model, train_cwic(model, teacher, data, recipe, **options)


def same(a, b):
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["all", "thresholds", "lora"])
def test_the_ratio_follows_its_target_and_only_what_the_mode_says_changes(mode):
    recipe = dataclasses.replace(RECIPE, mode=mode, train=dataclasses.replace(TRAIN, steps=30, learning_rate=1e-2),
                                 budget=budget.active(30, final=2.0))
    seen = []
    model, made = run(recipe, on_step=lambda record, module: seen.append(record))
    assert seen == made.history and [r.step for r in seen] == list(range(30))
    assert seen[0].ratio == pytest.approx(1.0, abs=1e-6) and seen[0].kl == pytest.approx(0.0, abs=1e-5)
    assert seen[-1].ratio > 1.5 and 0 < seen[-1].kl < 20 and seen[-1].target == 2.05
    assert all(r.kl == pytest.approx((r.forward_kl + r.reverse_kl) / 2, rel=1e-4, abs=1e-6) for r in seen)
    assert all(r.loss == pytest.approx(r.kl + 10 * min(r.ratio - r.target, 0) ** 2, rel=1e-3, abs=1e-5) for r in seen)
    assert {r.tokens for r in seen} == {24} and all(r.tokens_per_second > 0 for r in seen)
    assert made.run.losses == pytest.approx([r.loss for r in seen], rel=1e-6)
    dense, now = tiny("llama", tie_word_embeddings=True), model.state_dict()
    moved = {n for n, p in dense.named_parameters() if not torch.equal(now[n], p)}
    everything = {n for n, _ in dense.named_parameters()}
    blocks = {n for n in everything if "_proj" in n}
    assert moved == {"all": everything, "thresholds": set(), "lora": blocks}[mode]
    theta = registry_of(model).thresholds()
    assert all(float(t.detach().min()) >= 0 and float(t.detach().max()) > 0 for t in theta.values())
    assert not any("parametrizations" in name for name in now)


def test_adapters_are_part_of_the_masked_product_and_merging_changes_nothing():
    model = tiny("llama")
    registry = convert(model, CONFIG)
    model.train()(DATA)
    for theta in registry.thresholds().values():
        theta.data.fill_(0.5)
    model.eval()
    before = model(DATA).logits
    adapters = add_adapters(model, registry, rank=3)
    assert len(adapters) == 14 and torch.equal(model(DATA).logits, before)
    for adapter in adapters:
        adapter.b.data.normal_(std=0.1)
    adapted = model(DATA).logits
    assert add_adapters(model, registry, rank=3) == adapters
    with pytest.raises(SparsityError, match="another adapter"):
        add_adapters(model, registry, rank=4)
    merge_adapters(model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    torch.testing.assert_close(model(DATA).logits, adapted, rtol=1e-5, atol=1e-6)
    assert type(model.model.layers[0].self_attn.q_proj) is CWICLinear


@pytest.mark.parametrize("mode", ["all", "lora"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, mode):
    recipe = dataclasses.replace(RECIPE, mode=mode)
    whole, expected = run(recipe)

    with pytest.raises(KeyboardInterrupt):
        run(recipe, checkpoints=tmp_path, every=2, on_step=stop)
    model, made = run(recipe, checkpoints=tmp_path, every=2)
    assert made.run.resumed == 4 and made.run.losses == expected.run.losses and same(model, whole)

    def told(history):
        return [dataclasses.replace(r, tokens_per_second=0.0) for r in history]

    assert told(made.history) == told(expected.history)
    assert steps(tmp_path) == list(range(STEPS))


def stop(record, module):
    if record.step == 5:
        raise KeyboardInterrupt


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / LOG).read_text().splitlines()]


@pytest.mark.parametrize("torn", [b'{"step": 5, "lo', b"null\n", b"\xff\n", b"[" * 10**5, b'{"step": 5}'])
def test_a_line_that_was_being_written_is_forgotten(tmp_path, torn):
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints=tmp_path, every=2, on_step=stop)
    lines = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(b"".join(lines[:-1]) + torn)
    _, made = run(checkpoints=tmp_path, every=2)
    assert made.run.resumed == 4 and [r.step for r in made.history] == steps(tmp_path) == list(range(STEPS))


def test_a_resumed_run_that_ends_at_once_loses_no_line(tmp_path, monkeypatch):
    """Killed, or without room, where the log is put right; or refused, because another process is at it."""
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints=tmp_path, every=2, on_step=stop)
    before = (tmp_path / LOG).read_bytes()

    for fault, kind, said in ((OSError(28, "No space left on device"), SparsityError, f"cannot write {LOG} in .*No space left"),
                              (KeyboardInterrupt(), KeyboardInterrupt, None)):
        with monkeypatch.context() as patch:
            patch.setattr("sparsity_lib.project.os.fsync", lambda handle, fault=fault: (_ for _ in ()).throw(fault))
            with pytest.raises(kind, match=said):
                run(checkpoints=tmp_path, every=2)
        assert (tmp_path / LOG).read_bytes() == before
    with alone(tmp_path), pytest.raises(SparsityError, match="another process"):
        run(checkpoints=tmp_path, every=2)
    assert (tmp_path / LOG).read_bytes() == before and not list(tmp_path.glob("*.partial"))
    run(checkpoints=tmp_path, every=2)
    assert steps(tmp_path) == list(range(STEPS))


def test_a_log_without_room_is_a_clear_error(tmp_path):
    def fill(record, module):
        if record.step == 4:
            (tmp_path / LOG).rename(tmp_path / "so far")
            (tmp_path / LOG).symlink_to("/dev/full")

    with pytest.raises(SparsityError, match=f"cannot write {tmp_path / LOG}: No space left on device. Fix: .*last checkpoint"):
        run(checkpoints=tmp_path, every=2, on_step=fill)
    (tmp_path / "so far").replace(tmp_path / LOG)
    assert run(checkpoints=tmp_path, every=2)[1].run.resumed == 4 and steps(tmp_path) == list(range(STEPS))
    (tmp_path / LOG).unlink()
    (tmp_path / LOG).mkdir()
    with pytest.raises(SparsityError, match=f"cannot read {tmp_path / LOG}: Is a directory. Fix: "):
        run(checkpoints=tmp_path, every=2)


def test_checkpoints_of_another_run_or_model_are_refused(tmp_path):
    run(checkpoints=tmp_path)
    other = dataclasses.replace(RECIPE, budget=budget.active(STEPS, final=3.0))
    with pytest.raises(SparsityError, match="another run: its cwic.recipe"):
        run(other, checkpoints=tmp_path)
    with pytest.raises(SparsityError, match="another run: its cwic.config"):
        run(checkpoints=tmp_path, config=dataclasses.replace(CONFIG, bandwidth=0.2))
    model = tiny("llama", tie_word_embeddings=True, intermediate_size=60)
    teacher = teacher_of(model)
    convert(model, CONFIG)
    with pytest.raises(SparsityError, match="another module"):
        train_cwic(model, teacher, DATA, RECIPE, checkpoints=tmp_path)


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path):
    def spoil(record, module):
        if record.step == 4:
            module.model.embed_tokens.weight.data[:] = float("nan")

    with pytest.raises(SparsityError, match=r"The loss at step 5 is not finite.*last good checkpoint is .*step-00000004"):
        run(checkpoints=tmp_path, every=2, on_step=spoil)
    assert run(checkpoints=tmp_path, every=2)[1].run.losses == run()[1].run.losses


def test_packed_documents_train_and_padding_counts_for_nothing():
    g = torch.Generator().manual_seed(0)
    rows = pack([torch.randint(3, 61, (n,), generator=g).tolist() for n in (12, 12, 7, 5, 8, 9, 11, 4)], 12)
    padded = int((rows["segments"] == 0).sum())
    assert padded > 0
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(TRAIN, batch=len(rows["input_ids"]), steps=2))
    _, made = run(recipe, rows)
    assert made.history[0].tokens == rows["input_ids"].numel() - padded
    changed = {**rows, "input_ids": torch.where(rows["segments"] == 0, 5, rows["input_ids"])}
    assert run(recipe, changed)[1].run.losses == pytest.approx(made.run.losses, rel=1e-5)


def test_hidden_states_bfloat16_and_accumulation_are_options():
    for change, train in (({"mse": 0.5}, {}), ({}, {"precision": "bf16"}), ({}, {"accumulation": 2})):
        recipe = dataclasses.replace(RECIPE, **change, train=dataclasses.replace(TRAIN, steps=3, **train))
        _, made = run(recipe)
        assert all(r.loss < 100 for r in made.history) and (made.history[-1].mse is not None) is bool(change)
        if train.get("accumulation"):
            assert made.history[0].tokens == 24


def test_blocks_computed_twice_change_nothing():
    """Activation checkpointing: the same losses, gradients and statistics, which move once a step."""
    plain, made = run()
    model = tiny("llama", tie_word_embeddings=True)
    teacher = teacher_of(model)
    convert(model, CONFIG)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = train_cwic(model, teacher, DATA, RECIPE)
    assert again.run.losses == pytest.approx(made.run.losses, rel=1e-6)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    assert registry_of(model).ledger.moved is None
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SparsityError, match="Reentrant"):
        train_cwic(model, teacher, DATA, RECIPE)


def test_what_cannot_be_trained_is_refused():
    dense = tiny("llama")
    with pytest.raises(SparsityError, match="no granular layers"):
        train_cwic(dense, dense, DATA, RECIPE)
    with pytest.raises(SparsityError, match="ids"):
        run(data=DATA[:0])
    with pytest.raises(SparsityError, match="too few"):
        run(dataclasses.replace(RECIPE, train=dataclasses.replace(TRAIN, passes=1)), data=DATA[:3])
    with pytest.raises(SparsityError, match="one token"):
        run(data=DATA[:, :1])
    with pytest.raises(SparsityError, match="data"):
        run(data={"ids": DATA})
    model = tiny("llama")
    shared = teacher_of(model, share=True)
    convert(model, CONFIG)
    with pytest.raises(SparsityError, match="shares weights"):
        train_cwic(model, shared, DATA, RECIPE)
    with pytest.raises(SparsityError, match="granular too"):
        train_cwic(model, model, DATA, RECIPE)
    with pytest.raises(SparsityError, match="vocabulary"):
        train_cwic(model, tiny("llama", vocab_size=71), DATA, RECIPE)
    for bad in ({"mode": "some"}, {"eta": 0}, {"mse": -1}, {"rank": 0}, {"budget": None}):
        with pytest.raises(SparsityError, match=next(iter(bad)) if "budget" not in bad else "recipe"):
            dataclasses.replace(RECIPE, **bad)


@pytest.fixture(scope="module")
def trained():
    recipe = dataclasses.replace(RECIPE, mode="thresholds", train=dataclasses.replace(TRAIN, steps=20, learning_rate=1e-2),
                                 budget=budget.active(20, final=2.0))
    return run(recipe)[0].eval()


def test_a_trained_model_saves_and_loads_like_any_other(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".py", ".pkl")]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(DATA).logits, trained(DATA).logits)
    assert registry_of(again).config == registry_of(trained).config and registry_of(again).dense == registry_of(trained).dense
    assert again.lm_head.weight is again.model.embed_tokens.weight
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theta = {t.dtype for t in registry_of(half).thresholds().values()}
    assert theta == {torch.float32} and half.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.sparsity.theta, trained.lm_head.sparsity.theta)


def test_thresholds_alone_are_a_small_file_for_the_model_they_were_learnt_on(trained, tmp_path):
    path = save_thresholds(trained, tmp_path / "cwic.safetensors")
    fresh = tiny("llama", tie_word_embeddings=True)
    load_thresholds(fresh, path)
    assert torch.equal(fresh(DATA).logits, trained(DATA).logits)
    for change in ({"seed": 1}, {"intermediate_size": 60}):
        stranger = tiny("llama", tie_word_embeddings=True, **change)
        before = stranger(DATA).logits
        with pytest.raises(SparsityError, match="another model"):
            load_thresholds(stranger, path)
        assert torch.equal(stranger(DATA).logits, before) and "_cwic" not in stranger.__dict__
        convert(stranger, CONFIG)  # it is as it was
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SparsityError, match="no readable thresholds"):
        load_thresholds(tiny("llama"), path)
    with pytest.raises(SparsityError, match="no readable thresholds"):
        load_thresholds(tiny("llama"), tmp_path / "none")


def test_activity_is_counted_mask_by_mask(trained):
    registry, found = registry_of(trained), measure(trained, DATA, batch_size=3)
    name = "model.layers.1.self_attn.k_proj"
    layer, seen = registry.layers[name], []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        trained(DATA)
    handle.remove()
    kept = (seen[0] - layer.sparsity.mean).abs()[:, None] >= layer.sparsity.theta * layer.sparsity.std
    torch.testing.assert_close(found.frequency[name], kept.float().mean(0))
    assert torch.equal(found.read[name].flatten(), 8.0 * kept.double().sum((1, 2)))
    total = found.active_parameters()
    assert total.shape == DATA.shape and torch.equal(total.mean(1), found.per_sequence())
    assert found.ratio() == pytest.approx(float(found.dense / total.mean()))
    assert found.density()["k"][1] == pytest.approx(float(kept.double().mean())) and set(found.density()["head"]) == {-1}
    chosen = torch.zeros_like(DATA, dtype=torch.bool)
    chosen[:, 3:5] = True
    assert torch.equal(found.per_sequence(chosen), total[:, 3:5].mean(1))
    with pytest.raises(SparsityError, match="at least one"):
        found.per_sequence(chosen & False)
    trained.train()
    before = trained.lm_head.sparsity.mean.clone()
    measure(trained, DATA[:2])
    assert trained.training and torch.equal(trained.lm_head.sparsity.mean, before)
    trained.eval()


def test_padding_is_left_out_of_activity(trained):
    rows = pack([DATA[0, :9].tolist(), DATA[1, :8].tolist()], 12)
    found = measure(trained, rows["input_ids"], rows["segments"])
    alone = measure(trained, DATA[:1, :9])
    place = int((rows["segments"].sum(1) == 9).nonzero()[0])
    torch.testing.assert_close(found.active_parameters()[place, :9], alone.active_parameters()[0])
    assert found.valid.sum() == 17 and found.per_sequence()[place] == pytest.approx(float(alone.per_sequence()[0]))


def test_the_account_counts_what_is_read(trained):
    found, seen = account(trained, ids=DATA), measure(trained, DATA)
    assert found.read_weights == pytest.approx(float(seen.active_parameters().mean()), rel=1e-9)
    assert found.skipped == pytest.approx(1 - 1 / seen.ratio()) and found.dense_weights == registry_of(trained).dense
    assert set(found.skipped_by_role) == {"q", "k", "v", "o", "gate", "up", "down", "head"}
    assert sum(found.skipped_by_role.values()) == pytest.approx(found.skipped)
    assert found.skipped_by_role["up"] == pytest.approx(found.skipped_by_role["down"]) and found.method == "cwic"
    assert len(found.layer_sparsity["ffn"]) == 2 and found.tokens == DATA.numel()
    assert 0 < found.paper_counts["linears"] < 1
