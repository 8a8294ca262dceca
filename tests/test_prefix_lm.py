"""Packed tries give the log-likelihoods of plain forward passes, and of lm-eval's own model class."""

import itertools
import warnings

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate import bench_attention, bench_forward, bench_trie
from sparsity_lib.evaluate.bench_attention import attend, attending, blocks
from sparsity_lib.evaluate.bench_trie import ancestor_mask, batches, cut, pack_sequences, shared_prefixes
from sparsity_lib.evaluate.prefix_lm import PrefixLM

SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=25, unique=True
)
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **SLIDING, head_dim=8, query_pre_attn_scalar=8),
    "gemma2, soft-capped": lambda: transformers.Gemma2Config(
        **SMALL, **SLIDING, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0
    ),
    "mistral, sliding": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, alibi=False
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, bos_token_id=1, eos_token_id=1
    ),
}
#: Those whose attention transformers looks up by name; Gemma 2 caps its scores, Falcon does as it pleases.
BY_BLOCKS = ("llama", "gemma3", "mistral, sliding", "mixtral", "qwen2", "gpt2")


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def letters(bos: bool) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with one token a character, with or without a token at the start."""
    names = ["<s>", "</s>", "<unk>", *" abcdefghijklmnopqrstuvwxyz?:."]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def instances(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


PAIRS = [
    *itertools.product(["question: is it so? ", "question: is it a dog?", "what a day"], [" yes", " no", "n", " yes of course"]),
    ("", "from nothing"), ("word", " e"), ("word", " ee"), ("a prompt much longer than the model can read at once", " fine"),
]


def agree(ours: list, theirs: list, tolerance: float) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=tolerance, rtol=0)


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, st.integers(1, 40))
def test_packs_spell_every_sequence_once(sequences, limit):
    packs = pack_sequences(sequences, limit)
    assert sorted(index for pack in packs for index in pack.paths) == list(range(len(sequences)))
    for pack in packs:
        assert len(pack) <= limit or len(pack.paths) == 1
        prefixes = {sequences[index][: end + 1] for index in pack.paths for end in range(len(sequences[index]))}
        assert len(pack) == len(prefixes), "a shared prefix is stored twice, or a token is lost"
        mask = ancestor_mask(pack, len(pack) + 2)
        assert mask[len(pack) :].sum() == 2, "padding attends to more than itself"
        for index, path in pack.paths.items():
            assert tuple(pack.tokens[path]) == sequences[index]
            assert pack.positions[path].tolist() == list(range(len(path)))
            for depth, node in enumerate(path):
                assert mask[node].nonzero()[:, 0].tolist() == sorted(path[: depth + 1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8).map(tuple), min_size=1, max_size=8, unique=True))
def test_cuts_are_the_cheapest(sequences):
    ordered, limit = sorted(sequences), 14
    shared, lengths = shared_prefixes(ordered), np.array([len(s) for s in ordered])

    def cost(cuts: list[tuple[int, int]]) -> float:
        sizes = [lengths[a] + (lengths - shared)[a + 1 : b].sum() for a, b in cuts]
        fits = all(size <= limit or b - a == 1 for size, (a, b) in zip(sizes, cuts, strict=True))
        return sum(n + n * n / bench_trie.WHOLE_PACK + bench_trie.PACK_OVERHEAD for n in sizes) if fits else np.inf

    every = []
    for inner in itertools.product([False, True], repeat=len(ordered) - 1):
        edges = [0, *(place + 1 for place, yes in enumerate(inner) if yes), len(ordered)]
        every.append(cost(list(itertools.pairwise(edges))))
    assert cost(cut(lengths, shared, limit)) == pytest.approx(min(every))


def test_batches_hold_every_pack_within_the_limit():
    packs = pack_sequences([(i, *range(i % 7)) for i in range(40)], 4)
    for padded in (True, False):
        groups = batches(packs, 20, padded)
        assert sum(map(len, groups)) == len(packs)
        assert all((len(group) * max(map(len, group)) if padded else sum(map(len, group))) <= 20 for group in groups)
    assert len(groups) < len(batches(packs, 20)), "what is not padded takes fewer passes"
    assert [len(group) for group in batches(packs, 1, padded=False)] == [1] * len(packs), "a longer pack has its own pass"


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 9), st.sampled_from([None, 1, 3]), st.integers(1, 40))
def test_blocks_attend_to_what_the_mask_of_the_whole_pack_shows(sequences, size, window, limit):
    packs = pack_sequences(sequences, limit)
    nodes = sum(map(len, packs))
    wanted, place = torch.zeros(nodes, nodes, dtype=torch.bool), 0
    for pack in packs:
        visible = ancestor_mask(pack, len(pack))
        back = torch.from_numpy(pack.positions[:, None] - pack.positions)
        wanted[place : place + len(pack), place : place + len(pack)] = visible & (back < (window or nodes))
        place += len(pack)
    seen = torch.zeros_like(wanted)
    for block in blocks(packs, torch.float32, window, size):
        assert 0 < block.stop - block.start <= size
        rows = torch.zeros(block.stop - block.start, nodes, dtype=torch.bool)
        rows[:, block.keys] = block.mask[0, 0] == 0
        assert rows[:, block.keys].any(0).all(), "a key that no query sees"
        assert not seen[block.start : block.stop].any(), "queries twice"
        seen[block.start : block.stop] = rows
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_blocks_is_attention(shared, dtype):
    generator = torch.Generator().manual_seed(0)
    packs = pack_sequences([(0, *range(i), i, 7) for i in range(9)] + [(9, 8), (9, 7)], 15)
    assert len(packs) > 1
    nodes = sum(map(len, packs))
    query, key = (torch.randn(1, heads, nodes, 8, generator=generator).to(dtype) for heads in (2 * shared, 2))
    value = torch.randn(1, 2, nodes, 4, generator=generator).to(dtype)  # values may be narrower than keys
    config = CONFIGS["llama"]()
    with attending(config, [[], blocks(packs, dtype, size=4)]) as (_, mask):
        found, _ = attend(torch.nn.Module(), query, key, value, mask, scaling=0.3)
        assert config._attn_implementation == bench_attention.NAME
    assert config._attn_implementation != bench_attention.NAME
    visible = torch.block_diag(*(ancestor_mask(pack, len(pack)).float() for pack in packs)).bool()
    keys, values = (x.double().repeat_interleave(shared, 1) for x in (key, value))
    scores = (0.3 * query.double() @ keys.transpose(2, 3)).masked_fill(~visible, -torch.inf)
    exact = (scores.softmax(-1) @ values).transpose(1, 2)
    tolerance = 8 * torch.finfo(dtype).eps  # probabilities and values of about 1 are rounded, and so is the result
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    with attending(config, [[]]) as (mask,), pytest.raises(SparsityError, match="softcap"):
        attend(torch.nn.Module(), query, key, value, mask, softcap=5.0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_agrees_with_hflm_on_every_family(name, bos):
    model, tokenizer = model_of(name), letters(bos)
    lm = PrefixLM(model, tokenizer, max_length=40, pack_tokens=64, batch_tokens=128)
    assert lm.packed, lm.why_not_packed
    assert lm.by_blocks == (name in BY_BLOCKS), "attention that blocks do not know must be read whole, all other by blocks"
    theirs = HFLM(model, tokenizer=letters(bos), max_length=40, batch_size=3).loglikelihood(instances(PAIRS))
    agree(lm.loglikelihood(instances(PAIRS)), theirs, 1e-4)


def test_an_eager_model_with_logits_in_small_chunks_is_packed_too(monkeypatch):
    monkeypatch.setattr(bench_forward, "LOGITS_AT_ONCE", 3 * 64)  # three rows of the vocabulary at a time
    model = model_of("llama")
    model.set_attn_implementation("eager")
    lm = PrefixLM(model, letters(True))
    assert lm.packed and not lm.by_blocks
    plain = PrefixLM(model, letters(True), packed=False)
    agree(lm.loglikelihood(instances(PAIRS)), plain.loglikelihood(instances(PAIRS)), 1e-4)


def test_a_lora_model_is_packed_with_its_adapter():
    from peft import LoraConfig, get_peft_model

    base = model_of("llama")
    plain = PrefixLM(base, letters(True)).loglikelihood(instances(PAIRS))
    model = get_peft_model(base, LoraConfig(target_modules=["gate_proj"], init_lora_weights=False, lora_alpha=64)).eval()
    lm = PrefixLM(model, letters(True))
    assert lm.packed
    ours = lm.loglikelihood(instances(PAIRS))
    agree(ours, HFLM(model, tokenizer=letters(True)).loglikelihood(instances(PAIRS)), 1e-4)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, plain, strict=True)) > 0.1


def test_falls_back_once_and_aloud_where_packing_is_wrong():
    config = transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=256, initializer_range=0.3)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="unpacked") as seen:
        lm = PrefixLM(model, letters(True), max_length=40)
    assert len(seen) == 1 and not lm.packed
    theirs = HFLM(model, tokenizer=letters(True), max_length=40)
    agree(lm.loglikelihood(instances(PAIRS)), theirs.loglikelihood(instances(PAIRS)), 1e-4)


def test_the_self_test_catches_a_model_that_ignores_the_mask():
    class Blind(transformers.LlamaModel):
        def forward(self, *args, attention_mask=None, **options):
            return super().forward(*args, **options)

    model = model_of("llama")
    model.model.__class__ = Blind
    with pytest.warns(UserWarning, match="differ by"):
        assert not PrefixLM(model, letters(True)).packed


def test_sparsity_over_whole_sequences_is_not_packed():
    model = model_of("llama")
    model.sparsity_needs_sequences = True
    with pytest.warns(UserWarning, match="whole sequences"):
        assert not PrefixLM(model, letters(True)).packed


def test_bad_input_is_refused_and_the_tokenizer_left_alone():
    with pytest.raises(SparsityError, match="batch_tokens"):
        PrefixLM(model_of("llama"), letters(True), batch_tokens=0)
    with pytest.raises(SparsityError, match="head"):
        PrefixLM(transformers.LlamaModel(CONFIGS["llama"]()), letters(True))
    tokenizer = letters(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = PrefixLM(model_of("llama"), tokenizer, max_length=4)
    assert tokenizer.pad_token is None
    with pytest.raises(SparsityError, match="at most 4"):
        lm.loglikelihood(instances([("a", "bcdefgh")]))
    assert lm.loglikelihood([]) == []


def test_a_random_mask_is_no_reason_not_to_pack():
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, inputs, output: output * (torch.rand_like(output) < 0.9))
    assert PrefixLM(model, letters(True)).packed
