"""Against training: a small Llama pruned by SCAP beside its twin, which got two ReLUs before both read on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsity_lib.accounting import account
from sparsity_lib.assets.models import load_model
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.evaluate.bootstrap import Interval, mean_interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality, difference, evaluate
from sparsity_lib.experiments.claws_report import cell
from sparsity_lib.experiments.scap_common import recipe_of
from sparsity_lib.experiments.scap_report import in_points
from sparsity_lib.experiments.small_networks import SMALL
from sparsity_lib.fit import fit_many
from sparsity_lib.install import installed
from sparsity_lib.observe import activations
from sparsity_lib.report import Number
from sparsity_lib.sites import DOWN_IN, GATE
from sparsity_lib.train.tokenizer import bytes_of_tokens
from sparsity_lib.verdicts import Verdict, effect, not_testable

#: Targets for SCAP on the network as it was, and on top of the ReLUs. "up" is left alone in some of the latter.
PLAIN = tuple({"method": "scap", "up": u, "down": d} for u, d in ((0.1, 0.2), (0.2, 0.5), (0.3, 0.5), (0.4, 0.6), (0.5, 0.7)))
RELUFIED = tuple({"method": "scap", "up": u, "down": d} for u, d in ((0.2, 0.8), (0.4, 0.9)))
#: Calibration of both.
CALIBRATION = {"tokens": 8192, "length": 256, "batch_size": 8}
#: Allowed relative rise of the perplexity.
MARGIN = 0.01
#: Table 3: FFN sparsity in percent.
TURBO, SCAP = 82.2, 42.3


@dataclass(frozen=True)
class Trained:
    """One point: "plain" or "relufied", what was done to it, the share of the FFN's weights left unread, and its quality."""

    network: str
    what: str
    ffn: Interval
    quality: Quality

    def loss(self) -> Interval:
        """Nats per token."""
        return ratio_interval(self.quality.nll, self.quality.tokens)


def measure(plain: str, relufied: str, sequences: int, length: int, seed: int = 0) -> list[Trained]:
    """Both networks on the same text, by themselves and with SCAP; their tokenizer must be the same for losses to compare.

    By itself the network of ReLUs appears twice: with the weights that its own zeros save when the gate is computed first,
    and with what a predictor would save that knows all of them beforehand, as TurboSparse counts.
    """
    found = []
    for network, name, points in (("plain", plain, PLAIN), ("relufied", relufied, RELUFIED)):
        model, tokenizer = load_model(name)
        ids = token_sequences(tokenizer, "evaluation", tokens=sequences * length, length=length, seed=seed)
        fitted = fit_many([recipe_of(p) for p in points], model, tokenizer, **CALIBRATION)
        plans = dict(zip(map(named, points), fitted, strict=True))
        quality = evaluate(model, plans, ids, batch_size=8)
        for what, share in _by_itself(model, ids, network).items():
            found.append(Trained(network, what, share, quality["dense"]))
        for what, plan in plans.items():
            with installed(model, plan):
                share = account(model, ids=ids).paper_counts["ffn"]
            found.append(Trained(network, what, Interval(share, share, share), quality[what]))
    return found


def named(point: Mapping[str, Any]) -> str:
    """A point's targets in words."""
    return f"SCAP {100 * point['up']:.0f}/{100 * point['down']:.0f}%"


def _by_itself(model: nn.Module, ids: Tensor, network: str) -> dict[str, Interval]:
    if network == "plain":
        return {"as trained": Interval(0.0, 0.0, 0.0)}
    gate, product = (zeros(model, kind, ids) for kind in (GATE, DOWN_IN))
    return {"own zeros, gate first": mean_interval((gate + product) / 3), "own zeros, foreseen": mean_interval(product)}


def zeros(model: nn.Module, kind: str, ids: Tensor) -> np.ndarray:
    """Share of entries that are exactly zero at a kind of site, mean over layers, [sequences]."""
    layers = [(x == 0).double().mean(-1).view(len(ids), -1).mean(1) for x in activations(model, kind, ids)]
    return np.mean([layer.numpy() for layer in layers], axis=0)


def rows(found: Sequence[Trained]) -> list[list[Any]]:
    """Network, what was done, FFN weights skipped (%), loss in nats per token."""
    names = {"plain": "with its SiLU", "relufied": "with two ReLUs"}
    return [[names[p.network], p.what, in_points(p.ffn, ".1f"), cell(p.loss(), ".3f")] for p in found]


def apart(plain: Trained, other: Trained) -> Interval:
    """Nats per token by which the second lies above the first, paired over sequences."""
    return difference(other.quality, plain.quality, "nll")


def within(found: Sequence[Trained], margin: float = MARGIN) -> float:
    """The largest share that SCAP skips of the plain network's FFN at a perplexity at most `margin` above its own."""
    own = [p for p in found if p.network == "plain"]
    dense = own[0].loss().value
    return max(p.ffn.value for p in own if p.loss().value <= dense + np.log1p(margin))


def verdicts(found: Sequence[Trained]) -> list[Verdict]:
    """S9: the sparsity can be compared here, the scores cannot."""
    zero, base = next(p.ffn for p in found if p.what == "own zeros, foreseen"), within(found)
    words = "ReLUfication and training reach 82.2% FFN sparsity, SCAP 42.3% (table 3)"
    return [
        effect(
            "S9, sparsity", words,
            "points of FFN sparsity of the small network with ReLUs, its zeros foreseen, beyond SCAP's on its twin without them "
            f"within {MARGIN:.0%} of its perplexity",
            number=100 * (zero.value - base), low=100 * (zero.low - base), high=100 * (zero.high - base), published=TURBO - SCAP),
        verdict_scores(),
    ]


def verdict_scores() -> Verdict:
    """S9 on tasks needs networks that can do them."""
    return not_testable(
        "S9, scores", "SCAP is ahead on four of six tasks without training, the trained network on GSM8K and MMLU by its data",
        "takes two networks of one size that can do the tasks; the small ones can only be compared by their loss",
        'make run NB=scap P="plain=YOUR_GLU relufied=YOUR_DRELU"')


def network_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Name, what it is, weights, tokens or images seen, bits a byte, accuracy (%) of the networks trained for this book."""
    found = []
    for name in (*SMALL, "small-llama-relu"):
        if name not in data:
            continue
        made = data[name]
        quality, what = made["evaluation"], SMALL[name].what if name in SMALL else "its twin with two ReLUs"
        bits = Number(quality["bits_per_byte"], ".2f") if "bits_per_byte" in quality else None
        right = Number(100 * quality["accuracy"], ".1f") if "accuracy" in quality else None
        found.append([name, what, f"{made['parameters'] / 1e6:.2f} million", f"{made['seen']:,} {made['unit']}s", bits, right])
    return found


def bits_in(tokenizer: Any, ids: Tensor) -> float:
    """What a loss in nats, summed over the predicted tokens of `ids`, is divided by to give bits a byte: bytes times log 2."""
    return int(bytes_of_tokens(tokenizer)[ids[:, 1:]].sum()) * float(np.log(2))
