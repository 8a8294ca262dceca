"""Models whose blocks stay on disk: the ordinary path's plans and numbers, one block in memory, bad checkpoints refused."""

import json
import tempfile

import pytest
import torch
from core_tiny import VOCABULARY, inputs, outputs, tiny, tokens
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsity_lib import Plan, SparsityError, account, fit, fit_many, installed, load_model, observe, recipes, streamed
from sparsity_lib.by_block import final_states
from sparsity_lib.decode import Decoder
from sparsity_lib.errors import AssetError
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.parts.select import TopK
from sparsity_lib.sensitivity import curves
from sparsity_lib.shards import INDEX, SINGLE, Shards
from sparsity_lib.sites import find_sites
from sparsity_lib.weights import WeightPruning, prune_weights

IDS = tokens(4, 12)
#: Layouts of blocks and heads; gpt2 keeps its weights [in, out], mixtral its experts one by one on disk.
FAMILIES = ("llama", "gemma3", "mixtral", "gpt2", "phi3", "falcon", "cohere", "mistral")


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr("sparsity_lib.assets.models._tokenizer", lambda *args, **kwargs: None)


def stored(folder, family="llama", dtype=torch.float32, **changes):
    """A checkpoint in many small files."""
    layers = {"num_hidden_layers": 3} if family in ("llama", "mixtral") else {}
    tiny(family, dtype=dtype, **layers, **changes).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 3 and (folder / INDEX).is_file()
    return folder


def both(folder, **options):
    """The same checkpoint loaded ordinarily and streamed."""
    return tuple(load_model(str(folder), stream=stream, **options)[0] for stream in (False, True))


def same(found, expected):
    assert found.tensors.keys() == expected.tensors.keys() and found.recipe == expected.recipe
    assert found.widths == expected.widths
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def on_meta(model):
    return {name for name, p in model.named_parameters() if p.device.type == "meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_forward_is_the_models(family, tmp_path):
    ordinary, model = both(stored(tmp_path, family))
    inside = tuple(find_sites(model).blocks)
    assert on_meta(model) == {n for n, _ in model.named_parameters() if n.startswith(inside)}
    for _ in range(2):
        assert torch.equal(outputs(model, family), outputs(ordinary, family))
        assert on_meta(model) == {n for n, _ in model.named_parameters() if n.startswith(inside)}
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    tied = ordinary.get_output_embeddings().weight is ordinary.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_types_are_cast_as_they_are_ordinarily(family, held_as, dtype, tmp_path):
    ordinary, model = both(stored(tmp_path, family, dtype=held_as), dtype=dtype)
    assert torch.equal(outputs(model, family), outputs(ordinary, family))
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in ordinary.named_parameters()}
    assert {n: b.tolist() for n, b in model.named_buffers()} == {n: b.tolist() for n, b in ordinary.named_buffers()}


@pytest.mark.parametrize("tied", [False, True])
def test_plans_are_those_of_the_ordinary_path(tied, tmp_path):
    ordinary, model = both(stored(tmp_path, tie_word_embeddings=tied))
    made = [recipes.teal(0.5), recipes.cats(0.5), recipes.wina(0.5, select="threshold"), recipes.larosa(0.5),
            recipes.scap_centered(0.5), recipes.rsparse(0.5, rank_share=0.2, aware=True), recipes.claws(0.5),
            recipes.combined(0.5, rotate="none", score="saliency"), recipes.nm(2, 4, score="amber")]
    expected = fit_many(made, ordinary, ids=IDS, batch_size=3)
    for found, wanted in zip(fit_many(made, model, ids=IDS, batch_size=3), expected, strict=True):
        same(found, wanted)
    assert on_meta(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_of_other_structures(family, tmp_path):
    ordinary, model = both(stored(tmp_path, family))
    gated = "gate" in find_sites(model).kinds()
    made = [recipes.scap_for(model, 0.5, attention=0.7), *([recipes.cats(0.5), recipes.claws(0.5)] if gated else [])]
    for found, wanted in zip(fit_many(made, model, ids=IDS), fit_many(made, ordinary, ids=IDS), strict=True):
        same(found, wanted)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sequential_plans(family, tmp_path):
    ordinary, model = both(stored(tmp_path, family))
    made = recipes.scap(up=0.5, down=0.3)
    plan = fit(made, model, ids=IDS, sequential=True)
    same(plan, fit(made, ordinary, ids=IDS, sequential=True))
    assert not torch.equal(plan.tensors["1.up_in.threshold"], fit(made, model, ids=IDS).tensors["1.up_in.threshold"])


def test_encoders_and_batches_with_labels(tmp_path):
    ordinary, model = both(stored(tmp_path, "bert"))
    batches = [{**inputs("bert", seed=i), "labels": torch.tensor([0, 1])} for i in range(2)]
    made = [recipes.teal(0.5), recipes.combined(0.5, rotate="none", score="saliency", head="dense")]
    for found, wanted in zip(*(fit_many(made, m, batches=batches) for m in (model, ordinary)), strict=True):
        same(found, wanted)


def test_one_file_streams_too(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    ordinary, model = both(tmp_path)
    assert (tmp_path / SINGLE).is_file() and on_meta(model)
    assert torch.equal(outputs(model), outputs(ordinary))


def test_an_embedded_model_streams_too():
    ordinary, model = (load_model("minilm-l6", stream=stream)[0] for stream in (False, True))
    assert on_meta(model)
    assert torch.equal(model(input_ids=IDS).last_hidden_state, ordinary(input_ids=IDS).last_hidden_state)


def test_a_hub_id_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    held = tmp_path / "models--someone--tiny"
    blobs = stored(held / "blobs")
    (held / "snapshots" / "abc").mkdir(parents=True)
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("abc")
    for path in blobs.iterdir():
        (held / "snapshots" / "abc" / path.name).symlink_to(path)
    model = load_model("someone/tiny", stream=True)[0]
    assert torch.equal(outputs(model), outputs(load_model(str(blobs))[0]))
    with pytest.raises(SparsityError, match="'someone/other' could not be loaded"):
        load_model("someone/other", stream=True)


def watch(model, monkeypatch):
    """Elements of the blocks in memory, counted when each block has been read; and how often one was."""
    inside, counts, fill = tuple(find_sites(model).blocks), [], streamed.Weights.fill

    def counted(self, keys, what):
        found = fill(self, keys, what)
        counts.append(sum(p.numel() for n, p in model.named_parameters() if n.startswith(inside) and p.device.type != "meta"))
        return found

    monkeypatch.setattr(streamed.Weights, "fill", counted)
    return counts


@pytest.mark.parametrize("made", [recipes.teal(0.5), recipes.wina(0.5), recipes.larosa(0.5), recipes.claws(0.5)])
@pytest.mark.parametrize("sequential", [False, True])
def test_one_block_is_in_memory_at_a_time(made, sequential, tmp_path, monkeypatch):
    _, model = both(stored(tmp_path))
    if sequential and made.method.startswith("claws"):
        with pytest.raises(SparsityError, match="gradient of the whole model's loss"):
            fit(made, model, ids=IDS, sequential=True)
        return
    counts = watch(model, monkeypatch)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    plan = fit(made, model, ids=IDS, sequential=sequential)
    assert set(counts) == {block}
    gradients = made.method.startswith("claws")
    if not gradients:
        assert len(counts) == 3
    counts.clear()
    with installed(model, plan):
        account(model, ids=IDS)
    assert counts == [block] * 3
    counts.clear()
    evaluate(model, {"plan": plan}, IDS)
    assert counts == [block] * 12  # twice the text, and twice the four tokens that the head is tried on
    assert model.__dict__["_sparsity_stored"].blocks_read >= 18


def test_memory_is_that_of_one_block_where_a_block_fails(tmp_path, monkeypatch):
    _, model = both(stored(tmp_path))
    before = on_meta(model)
    monkeypatch.setattr("sparsity_lib.collectors.LogHistogram.update", lambda *args: 1 / 0)
    for sequential in (False, True):
        with pytest.raises(ZeroDivisionError):
            fit(recipes.teal(0.5), model, ids=IDS, sequential=sequential)
        assert on_meta(model) == before
    monkeypatch.setattr("sparsity_lib.collectors.GradientSize.update", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(recipes.claws(0.5), model, ids=IDS)
    assert on_meta(model) == before
    monkeypatch.undo()
    monkeypatch.setattr("sparsity_lib.assets.models._tokenizer", lambda *args, **kwargs: None)
    ordinary = load_model(str(tmp_path))[0]
    assert torch.equal(outputs(model), outputs(ordinary))


def test_temporary_files_without_room_are_named(tmp_path, monkeypatch):
    _, model = both(stored(tmp_path / "model"))
    before, place = on_meta(model), tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    expected = fit(recipes.claws(0.5), model, ids=IDS)
    assert list(place.iterdir()) == []
    written, needed = [], 3 * IDS.numel() * 32 * 4

    def full(tensors, file):
        if len(written) == 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(file)
        save_file(tensors, file)

    def cut(tensors, file):
        save_file(tensors, file)
        file.write_bytes(file.read_bytes()[:-8])

    for write, said in ((full, rf"block 2 in {place}: .*No space left.* All 3 blocks take {needed:,} bytes\. Fix: .*TMPDIR="),
                        (cut, rf"cannot read back .* in {place}/.*2\.safetensors: .*Fix: .*TMPDIR=")):
        monkeypatch.setattr("sparsity_lib.by_block.save_file", write)
        with pytest.raises(SparsityError, match=said):
            fit(recipes.claws(0.5), model, ids=IDS)
        assert on_meta(model) == before and list(place.iterdir()) == []
    monkeypatch.setattr("sparsity_lib.by_block.save_file", save_file)
    same(fit(recipes.claws(0.5), model, ids=IDS), expected)
    place.rmdir()
    with pytest.raises(SparsityError, match=f"cannot write temporary files in {place}: .*Fix: .*TMPDIR="):
        fit(recipes.claws(0.5), model, ids=IDS)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_installing_counting_and_evaluating(family, tmp_path):
    ordinary, model = both(stored(tmp_path / "model", family))
    made = [recipes.teal(0.5), recipes.cats(0.4)] + ([recipes.rsparse(0.5)] if family == "llama" else [])
    for found in fit_many(made, model, ids=IDS):
        found.save(tmp_path / "plan.safetensors")
        plan = Plan.load(tmp_path / "plan.safetensors")
        with installed(ordinary, plan), installed(model, plan):
            assert torch.equal(outputs(model, family), outputs(ordinary, family))
            assert account(model, ids=IDS) == account(ordinary, ids=IDS)
        sparse = {"sparse": plan}
        assert evaluate(model, sparse, IDS, batch_size=3) == evaluate(ordinary, sparse, IDS, batch_size=3)
    assert on_meta(model) and not model.state_dict().keys() - ordinary.state_dict().keys()


def test_looking_at_activations_and_costs(tmp_path):
    ordinary, model = both(stored(tmp_path))
    for a, b in zip(observe.activations(model, "up_in", IDS), observe.activations(ordinary, "up_in", IDS), strict=True):
        assert torch.equal(a, b)
    plan = fit(recipes.combined(0.5, rotate="none"), ordinary, ids=IDS)
    assert curves(plan, model, ids=IDS).costs == curves(plan, ordinary, ids=IDS).costs
    batches = [IDS[:3], IDS[3:]]
    for a, b in zip(final_states(model, batches), final_states(ordinary, batches), strict=True):
        assert torch.equal(a, b)


def test_generating(tmp_path):
    ordinary, model = both(stored(tmp_path))
    found, expected = (m.generate(IDS[:1], max_new_tokens=3, do_sample=False) for m in (model, ordinary))
    assert torch.equal(found, expected)


def test_what_needs_all_weights_is_refused(tmp_path):
    _, model = both(stored(tmp_path))
    pruning = WeightPruning(TopK(0.5), "magnitude")
    for ask in (lambda: model.save_pretrained("x"), lambda: Decoder(model), lambda: prune_weights(model, pruning)):
        with pytest.raises(SparsityError, match="blocks stay on disk.*without stream"):
            ask()
    with pytest.raises(SparsityError, match="stream = 1.*true or false"):
        load_model(str(tmp_path), stream=1)


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def rewrite(folder, **files):
    found = index_of(folder)
    found["weight_map"] |= files
    (folder / INDEX).write_text(json.dumps(found))


QUERY = "model.layers.1.self_attn.q_proj.weight"


def refused(folder, match, kind=SparsityError, stream=True):
    with pytest.raises(kind, match=match):
        load_model(str(folder), stream=stream)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("file", [
    "/dev/zero", "../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", "",
    "pytorch_model.bin", "x.pt", 3, None, ["x.safetensors"]])
def test_an_index_that_leaves_its_folder_is_refused(file, stream, tmp_path):
    folder = stored(tmp_path / "model")
    save_file({QUERY: torch.zeros(32, 32)}, tmp_path / "x.safetensors")
    rewrite(folder, **{QUERY: file})
    refused(folder, rf"file of '{QUERY}' in {INDEX} = .*\.safetensors file beside it", stream=stream)


@pytest.mark.parametrize("name", ["model.safetensors", ""], ids=["one file", "one of several"])
@pytest.mark.parametrize("stream", [True, False])
def test_weights_in_what_is_no_file_are_refused(name, stream, tmp_path):
    """A link to a device, of which a reader would never see the end; a link to a file is as good as the file."""
    folder = stored(tmp_path)
    (folder / "kept").mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(folder / "kept" / path.name)
        path.symlink_to(folder / "kept" / path.name)
    load_model(str(folder), stream=stream)
    name = name or index_of(folder)["weight_map"][QUERY]
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")
    refused(folder, f"{name} is no regular file", AssetError, stream)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    (stored(tmp_path) / INDEX).write_text(text)
    refused(tmp_path, "is no index of weights", AssetError)


def test_files_that_are_missing_cut_off_or_others_are_refused(tmp_path):
    folder = stored(tmp_path)
    path = folder / index_of(folder)["weight_map"][QUERY]
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", b"\x80\x02}q\x00." * 99, whole + b"more"):
        path.write_bytes(damage)
        refused(folder, f"{path.name} is no whole safetensors file.*cut off", AssetError)
    path.unlink()
    refused(folder, f"{path.name} is missing", AssetError)


def test_an_index_that_names_another_file_is_refused(tmp_path):
    folder = stored(tmp_path)
    other = next(f for n, f in index_of(folder)["weight_map"].items() if f != index_of(folder)["weight_map"][QUERY])
    rewrite(folder, **{QUERY: other})
    refused(folder, f"says that '{QUERY}' is in {other}, but that file does not hold it", AssetError)


def replaced(folder, change):
    path = folder / index_of(folder)["weight_map"][QUERY]
    found = load_file(path)
    found[QUERY] = change(found[QUERY])
    save_file(found, path, metadata={"format": "pt"})
    return path


def test_wrong_types_and_shapes_are_refused(tmp_path):
    folder = stored(tmp_path)
    replaced(folder, lambda w: w.to(torch.int8))
    refused(folder, f"dtype of '{QUERY}' in .* = 'I8' is not allowed.*BF16")
    replaced(folder, lambda w: w.to(torch.float8_e4m3fn))
    refused(folder, "F8_E4M3.*quantised checkpoints are not read")
    replaced(folder, lambda w: torch.zeros(32, 31))
    refused(folder, r"\[32, 31\], and the configuration says \[32, 32\]", AssetError)


def without(folder, *names):
    """Take tensors out of index and files."""
    found = index_of(folder)
    for name in names:
        path = folder / found["weight_map"].pop(name)
        left = {key: tensor.clone() for key, tensor in load_file(path).items() if key != name}
        save_file(left or {"other": torch.zeros(1)}, path, metadata={"format": "pt"})
        if not left:
            found["weight_map"]["other"] = path.name
    (folder / INDEX).write_text(json.dumps(found))


@pytest.mark.parametrize("name", [QUERY, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_missing_weights_are_refused(name, tmp_path):
    folder = stored(tmp_path)
    without(folder, name)
    refused(folder, f"no weights for 1 of the model's parameters: {name}", AssetError)


def test_a_missing_expert_is_refused_when_its_block_is_read(tmp_path):
    folder = stored(tmp_path, "mixtral")
    gone = [name for name in index_of(folder)["weight_map"] if ".layers.1." in name and ".experts.3." in name]
    assert len(gone) == 3
    without(folder, *gone)
    model = load_model(str(folder), stream=True)[0]
    with pytest.raises(AssetError, match=r"weights of block model\.layers\.1 do not fit the model: model\.layers\.1.*experts"):
        outputs(model, "mixtral")
    assert on_meta(model) == on_meta(load_model(str(folder), stream=True)[0])  # what had been read of the block is gone


def test_a_file_that_changes_under_way_is_refused(tmp_path):
    folder = stored(tmp_path)
    model = load_model(str(folder), stream=True)[0]
    path = replaced(folder, lambda w: torch.zeros(32, 33))
    with pytest.raises(AssetError, match=f"{path.name} has changed since it was opened"):
        fit(recipes.teal(0.5), model, ids=IDS)


def test_pickle_and_nothing_are_refused(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    refused(tmp_path, f"holds no weights: expected {SINGLE} or {INDEX}", AssetError)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(tmp_path, r"holds weights as pickle \(pytorch_model\.bin\), which can run code and is not read", AssetError)


def test_quantised_checkpoints_are_refused(tmp_path):
    folder = stored(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "sparsity_lib"}}))
    refused(folder, "quantised checkpoint with stream")


def test_shards_know_what_they_hold(tmp_path):
    shards = Shards(stored(tmp_path, dtype=torch.bfloat16))
    assert shards.entries["model.embed_tokens.weight"].shape == (VOCABULARY, 32)
    model = tiny("llama", num_hidden_layers=3, dtype=torch.bfloat16)
    assert shards.nbytes == sum(p.nbytes for p in model.parameters())
    with shards.opened([QUERY, "lm_head.weight"]) as found:
        assert torch.equal(found[QUERY][...], model.get_parameter(QUERY))
