"""The compiled decoder against Hugging Face's own forward, token by token."""

import dataclasses

import pytest
import torch
from core_tiny import tiny, tokens
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config

from sparsity_lib import Recipe, Rule, SparsityError, fit, install, installed, recipes
from sparsity_lib.decode import Decoder, RandomSource
from sparsity_lib.decode.architecture import Architecture
from sparsity_lib.decode.rules import Choice
from sparsity_lib.ops import library, reference
from sparsity_lib.parts.scores import ColumnNorm, Value
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.parts.shift import Shift
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.sites import find_sites

pytestmark = pytest.mark.skipif(library.path() is None, reason="no compiled library")
IDS = tokens(4, 10)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


@torch.no_grad()
def forced(model, plan, ids, decoder, prompt):
    """The largest difference between the decoder's logits and one whole forward's, over the tokens after the prompt."""
    with installed(model, plan):
        whole = model(input_ids=ids).logits[0].float()
    found = [decoder.prefill(ids[:, :prompt])]
    found += [decoder.step(int(token)).clone() for token in ids[0, prompt:]]
    return float((torch.stack(found) - whole[prompt - 1 :]).abs().max() / whole.std())


def uneven(family, **changes):
    """A tiny model whose norms and biases all differ: one that is swapped or left out shows."""
    model = tiny(family, **changes)
    draw = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("prompt", [1, 5, 13])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_are_the_models_own(family, prompt):
    changes = {"sliding_window": 4} if family in ("mistral", "gemma2", "gemma3") else {}
    if family.startswith("gemma"):
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    model, ids = uneven(family, **changes), tokens(1, 24)
    assert forced(model, None, ids, Decoder(model, capacity=24), prompt) < 1e-5


@pytest.mark.parametrize("head_dim", [6, 64, 128, 256])
def test_heads_of_every_size_attend_alike(head_dim):
    model, ids = uneven("qwen3", head_dim=head_dim), tokens(1, 40)
    assert forced(model, None, ids, Decoder(model, capacity=40), prompt=3) < 1e-5


def test_a_bfloat16_model_comes_close():
    for family in ("llama", "gemma3"):
        model, ids = tiny(family, dtype=torch.bfloat16), tokens(1, 16)
        assert forced(model, None, ids, Decoder(model, capacity=16), prompt=4) < 0.1


def sparse():
    everywhere = Recipe("inputs", tuple(Rule(site, Threshold(0.5)) for site in ("qkv_in", "o_in", "up_in", "down_in")))
    return [
        recipes.cats(0.5), recipes.claws(0.5), recipes.gate_topk(0.4), everywhere,
        recipes.larosa(0.5), recipes.gaussian(0.4), recipes.gaussian_inputs(0.5),
        Recipe("wina", (Rule("down_in", TopK(0.5), ColumnNorm()), Rule("o_in", TopK(0.5), ColumnNorm()))),
    ]


@pytest.mark.parametrize("recipe", sparse(), ids=lambda r: r.method)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sparse_logits_are_the_installed_plans(family, recipe):
    model, ids = tiny(family), tokens(1, 20, seed=3)
    plan = fit(recipe, model, ids=IDS)
    decoder = Decoder(model, plan, capacity=20)
    assert forced(model, plan, ids, decoder, prompt=4) < 1e-4
    dense = Decoder(model, capacity=20)
    dense.prefill(ids[:, :4])
    dense.step(5)
    assert decoder.bytes_read < dense.bytes_read


LOW_RANK = [
    recipes.rsparse(0.5, rank_share=0.2), recipes.rsparse(0.4, select="topk", aware=True),
    recipes.combined(0.5, rotate="all", repair="low_rank", head="dense"), recipes.with_head(recipes.rsparse(0.5, rank_share=0.1)),
]


@pytest.mark.parametrize("recipe", LOW_RANK, ids=range(len(LOW_RANK)))
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_what_is_dropped_goes_through_a_low_rank_product(family, recipe):
    """Matrices that are joined have a block of the product each, the zeros between which are read too."""
    model, ids = tiny(family), tokens(1, 20, seed=3)
    plan = fit(recipe, model, ids=IDS)
    decoder = Decoder(model, plan, capacity=20)
    assert forced(model, plan, ids, decoder, prompt=4) < 1e-4
    bare = dataclasses.replace(recipe, rules=tuple(dataclasses.replace(rule, repair=()) for rule in recipe.rules))
    without = Decoder(model, fit(bare, model, ids=IDS), capacity=20)
    for each in (decoder, without):
        each.prefill(ids[:, :4])
        each.step(5)
    if recipe.rules[0].select.kind == "topk":  # as many entries are kept with it and without
        added = sum(piece.weights_read(site) for rule, site in recipe.placed(find_sites(model)) for piece in rule.repair)
        assert decoder.bytes_read >= without.bytes_read + 4 * added


def test_values_are_not_ranked_with_their_sign():
    model = tiny("llama")
    plan = fit(Recipe("values", (Rule("gate", TopK(0.5), Value()),)), model, ids=IDS)
    with pytest.raises(SparsityError, match="rank sizes, not values"):
        Decoder(model, plan)
    low = ((torch.ones(32, 2), torch.ones(2, 32)),)
    moved, scaled = Choice(k=3, low_rank=low, shift=torch.ones(32)), Choice(k=3, low_rank=low, repair=True)
    for wrong, site in ((moved, "o_in"), (scaled, "o_in"), (Choice(k=3, low_rank=low), "gate")):
        with pytest.raises(SparsityError, match="stands alone|does not repair"):
            wrong.check(site, 32)


def test_a_gaussian_that_keeps_all_keeps_all():
    model, ids = tiny("llama"), tokens(1, 20, seed=3)
    for recipe in (recipes.gaussian(1.0), recipes.gaussian_inputs(1.0)):
        plan = fit(recipe, model, ids=IDS)
        assert forced(model, None, ids, Decoder(model, plan, capacity=20), prompt=4) < 1e-4


HEADS = [
    Recipe("head", (recipes.head_rule(0.5),)), Recipe("refined", (recipes.head_rule(0.3, refine=0.1),)),
    Recipe("rotated", (recipes.head_rule(0.3, transform=Rotate(), refine=0.1),)),
    Recipe("threshold", (Rule("head_in", Threshold(0.4), ColumnNorm()),)), recipes.with_head(recipes.larosa(0.6)),
    Recipe("shifted", (Rule("head_in", TopK(0.5), transform=Shift("mean")),)),
    recipes.combined(0.5, refine=0.1, rotate="all"), recipes.with_head(recipes.cats(0.5), 0.5, refine=1.0),
]


@pytest.mark.parametrize("recipe", HEADS, ids=lambda r: r.method)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen2"])
def test_heads_that_skip_inputs_are_the_installed_plans(family, recipe):
    model, ids = tiny(family), tokens(1, 20, seed=3)  # llama's head is its own, the others' is the embedding
    plan = fit(recipe, model, ids=IDS)
    decoder = Decoder(model, plan, capacity=20)
    assert forced(model, plan, ids, decoder, prompt=4) < 1e-4
    if recipe.method in ("head", "refined"):  # rotations as wide as a head of 61 words is high read more than they save
        dense = Decoder(model, capacity=20)
        for each in (decoder, dense):
            each.prefill(ids[:, :4])
            each.step(5)
        assert decoder.bytes_read < dense.bytes_read


@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize(("vocabulary", "share"), [(2000, 0.02), (4099, 0.1), (9000, 0.05), (1500, 0.3)])
def test_likely_words_of_many_are_found_by_a_sample_and_without(vocabulary, share, misled):
    """1024 logits, evenly spaced, say where to look; where the large ones are just those, they mislead, and all are ranked.

    Where they lie four and more apart, that is: the floor that they suggest then leaves fewer than are wanted.
    """
    model, ids = tiny("llama", vocab_size=vocabulary), tokens(1, 20, seed=3)
    if misled:
        step = vocabulary // 1024
        model.lm_head.weight.data[: 1024 * step : step] *= 50
    plan = fit(Recipe("refined", (recipes.head_rule(0.3, refine=share),)), model, ids=IDS)
    decoder = Decoder(model, plan, capacity=20)
    assert forced(model, plan, ids, decoder, prompt=4) < 1e-4


def test_heads_that_the_decoder_cannot_skip_inputs_of_are_refused():
    model = tiny("llama")
    moved = Choice(k=3, shift=torch.ones(32), refine=0.1)
    with pytest.raises(SparsityError, match="refines no outputs that a shift has moved"):
        Decoder(model, choices=lambda layer, site, width: moved if site == "head_in" else None)
    with pytest.raises(SparsityError, match="refine at site up_in"):
        Decoder(model, choices=lambda layer, site, width: Choice(k=3, refine=0.1) if site == "up_in" else None)


def test_a_shift_that_drops_nothing_changes_nothing():
    model, ids = uneven("qwen2"), tokens(1, 16)
    draw = torch.Generator().manual_seed(5)

    def choose(layer, site, width):
        rotation = torch.linalg.qr(torch.randn(width, width, generator=draw))[0] if site == "up_in" else None
        return None if site == "gate" else Choice(k=width, shift=torch.randn(width, generator=draw), rotation=rotation)

    assert forced(model, None, ids, Decoder(model, choices=choose, capacity=16), prompt=4) < 1e-4


def test_a_shift_moves_what_is_dropped_to_the_mean():
    model, ids = tiny("llama"), tokens(1, 12)
    shifts = {}

    def choose(layer, site, width):  # nothing survives: every input of `down` becomes its shift
        if site != "down_in":
            return None
        shifts[layer] = torch.randn(width, generator=torch.Generator().manual_seed(layer))
        return Choice(k=0, shift=shifts[layer])

    decoder = Decoder(model, choices=choose, capacity=12)
    hooks = [block.mlp.down_proj.register_forward_pre_hook(lambda m, x, i=i: (shifts[i].expand_as(x[0]),))
             for i, block in enumerate(model.model.layers)]
    assert forced(model, None, ids, decoder, prompt=4) < 1e-4
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("rule, repair", [({"k": 2, "group": 4}, False), ({"k": 2, "group": 4}, True), ({"k": 9}, True),
                                          ({"threshold": 0.1}, True)])
def test_groups_and_repairs_are_what_the_reference_does(rule, repair):
    model, ids = tiny("llama"), tokens(1, 12)

    def choose(layer, site, width):
        return Choice(repair=repair, **rule) if site in ("qkv_in", "down_in") else None

    def prune(module, x):
        flat = x[0][0]
        mask = reference.keep(flat, threshold=rule.get("threshold"), k=rule.get("k"), m=rule.get("group", 0))
        kept = torch.where(mask, flat, 0)
        return ((reference.repaired(kept, flat) if repair else kept)[None],)

    decoder = Decoder(model, choices=choose, capacity=12)
    names = ("q_proj", "k_proj", "v_proj", "down_proj")
    hooks = [module.register_forward_pre_hook(prune) for name, module in model.named_modules() if name.endswith(names)]
    assert forced(model, None, ids, decoder, prompt=4) < 1e-4
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("site, wrong, message", [
    ("up_in", {"group": 65}, "pattern at site up_in = '1:65'"), ("gate", {"repair": True}, "does not repair the gate"),
    ("o_in", {"scale": torch.ones(3)}, "scale of site o_in"), ("up_in", {"shift": torch.ones(3)}, "shift of site up_in"),
    ("qkv_in", {"rotation": torch.eye(3)}, "rotation of site qkv_in"), ("gate", {"shift": torch.ones(48)}, "neither shifted"),
])
def test_choices_that_do_not_fit_are_refused(site, wrong, message):
    with pytest.raises(SparsityError, match=message):
        Decoder(tiny("llama"), choices=lambda layer, at, width: Choice(k=1, **wrong) if at == site else None)


@pytest.mark.parametrize("recipe", [None, recipes.cats(0.5), recipes.claws(0.5)], ids=["dense", "cats", "claws"])
def test_generation_is_token_identical_in_float32(recipe):
    model, ids = tiny("llama"), tokens(1, 6)
    plan = None if recipe is None else fit(recipe, model, ids=IDS)
    with installed(model, plan), torch.no_grad():
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 6:]
    assert torch.equal(Decoder(model, plan, capacity=64).generate(ids, 40), expected)


def test_dense_bytes_are_those_of_all_linears():
    model = tiny("llama")
    decoder = Decoder(model, capacity=8)
    decoder.step(3)
    names = [n for n, _ in model.named_parameters() if "proj" in n or "lm_head" in n]
    exact = 4 * sum(model.get_parameter(n).numel() for n in names)
    assert exact <= decoder.bytes_read <= 1.5 * exact  # rows are padded to whole lines, and these are tiny


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_narrow_weights_come_close(format):
    model, ids = tiny("llama"), tokens(1, 12)
    exact, narrow = Decoder(model, capacity=13), Decoder(model, capacity=13, format=format)
    exact.prefill(ids), narrow.prefill(ids)
    a, b = exact.step(7).softmax(-1), narrow.step(7).softmax(-1)
    assert float((a - b).abs().sum()) < {"bfloat16": 0.05, "int8": 0.1, "int4": 1.0}[format]


def test_a_random_model_of_a_given_shape_decodes():
    config = Qwen3Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8)
    decoder = Decoder(RandomSource(config), capacity=8)
    assert all(decoder.step(token).isfinite().all() for token in range(8))
    with pytest.raises(SparsityError, match=r"holds 8 tokens and is full.*capacity="):
        decoder.step(1)
    decoder.reset()
    decoder.step(1)


def test_what_the_decoder_cannot_do_is_said():
    model = tiny("llama")
    for make, part in ((recipes.oracle, "'oracle'"), (recipes.random, "'random'")):
        with pytest.raises(SparsityError, match=part):
            Decoder(model, fit(make(0.5), model, ids=IDS))
    both = Recipe("both", (Rule("up_in", TopK(0.5)), Rule("gate", TopK(0.5))))
    with pytest.raises(SparsityError, match="inputs or its neurons"):
        Decoder(model, fit(both, model, ids=IDS))
    with pytest.raises(SparsityError, match="model type 'gpt2'"):
        Decoder(tiny("gpt2"))
    with pytest.raises(SparsityError, match="float16"):
        Decoder(tiny("llama", dtype=torch.float16))
    sparse_model = install(tiny("llama"), fit(recipes.cats(0.5), model, ids=IDS))
    with pytest.raises(SparsityError, match="uninstall"):
        Decoder(sparse_model)
    decoder = Decoder(model, capacity=4)
    with pytest.raises(SparsityError, match="token = 61"):
        decoder.step(61)
    with pytest.raises(SparsityError, match="shape of ids"):
        decoder.prefill(tokens(1, 5))
    with pytest.raises(SparsityError, match="holds 4 tokens, 12 are needed.*capacity=12"):
        decoder.generate(tokens(1, 3), 10)
    with pytest.raises(SparsityError, match="fitted to 2 blocks"):
        Decoder(tiny("llama", intermediate_size=96), fit(recipes.claws(0.5), model, ids=IDS))
    adapted = get_peft_model(tiny("llama"), LoraConfig(target_modules=["gate_proj"])).get_base_model()
    with pytest.raises(SparsityError, match="gate_proj of block 0.*merge adapters"):
        Decoder(adapted)
    with pytest.raises(SparsityError, match="rotations of type 'dynamic'"):
        config = tiny("llama").config
        config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        Architecture.of(config)
    random = Decoder(RandomSource(Qwen3Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2, head_dim=8)), capacity=4)
    with pytest.raises(SparsityError, match="no prompt to read"):
        random.prefill(tokens(1, 3))
