"""A bench for the comparison's experiments: a tiny model, made-up text."""

import torch
from core_tiny import VOCABULARY, tiny, tokens

from sparsity_lib.cwic import CWICConfig, convert
from sparsity_lib.experiments import common, compare_common, compare_granular
from sparsity_lib.experiments.compare_common import Bench

IDS = tokens(3, 16)


class Checkpoint:
    """Runs every item, each known by other parameters."""

    def __init__(self):
        self.seen = []

    def item(self, params, compute):
        assert params not in self.seen
        self.seen.append(params)
        return compute()

    def items(self, wanted):
        return [self.item(params, compute) for params, compute in wanted]


def tied():
    """A model whose head's weights are its embeddings too."""
    return tiny("llama", tie_word_embeddings=True)


def bench_of(model, monkeypatch):
    """A bench on a tiny model and made-up text."""
    monkeypatch.setattr(common, "CALIBRATION", {"tokens": 48, "length": 16, "seed": 0})
    monkeypatch.setattr(compare_common, "SEARCH", {"tokens": 32, "length": 16})

    def texts(tokenizer, split="", tokens=48, length=16, **options):
        draw = torch.Generator().manual_seed(len(split))
        return torch.randint(3, VOCABULARY, (max(1, tokens // length), length), generator=draw)

    monkeypatch.setattr("sparsity_lib.assets.texts.token_sequences", texts)
    made = Bench.__new__(Bench)
    made.name, made.fitted, made.model, made.tokenizer, made.ids = "tiny", model, model, object(), IDS
    made._last = ("", None)
    monkeypatch.setattr(compare_granular, "load", lambda share: granular(share))
    return made


def granular(share):
    """A converted model with thresholds in the middle of its inputs."""
    made = tied()
    registry = convert(made, CWICConfig(stripe={"q": 16, "gate": 12}))
    with torch.no_grad():
        for layer in registry.layers.values():
            layer.sparsity.theta.fill_(share)
    return made.eval()
