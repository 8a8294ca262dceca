"""Networks of unlike kinds behind one face: fit recipes to them, and score them, dense or sparse, unit by unit.

A unit is what a bootstrap draws: a document, a sequence, a pair of sentences, an image. `Scores.loss` is what one unit
loses (smaller is better), `Scores.right` how well it does its task (larger is better), both summed over `Scores.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sparsity_lib.accounting import recorded, summarise
from sparsity_lib.assets.benchmarks import load_benchmark
from sparsity_lib.assets.models import load_model
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.evaluate.paraphrase import embed, judged, roc_auc
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common, scap_common
from sparsity_lib.fit import fit_many
from sparsity_lib.install import installed
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe


@dataclass(frozen=True)
class Scores:
    """loss, right, weights: [units]; shares: what was left unread (None when dense); more: figures of the whole."""

    loss: list[float]
    right: list[float]
    weights: list[float]
    shares: dict[str, Any] | None
    more: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Network(Protocol):
    """What the experiments need of a network."""

    model: nn.Module
    #: "share" where `right` counts what is right, "log" where it holds log-likelihoods.
    scale: str

    def fit(self, recipes: Sequence[Recipe]) -> list[Plan]: ...

    def score(self, plan: Plan | None) -> Scores: ...

    def run(self) -> None:
        """Run the model as it is on a text or images of its kind, for whoever watches its activations."""


class Sentences:
    """all-MiniLM-L6-v2, an encoder with a plain GELU FFN: MRPC's 408 validation pairs, and how far embeddings move.

    loss: 1 - cosine to the dense embedding, summed over a pair's two sentences. right: whether the pair is judged rightly
    with a border fitted on the other half of the pairs.
    """

    scale = "share"

    def __init__(self, name: str = "minilm-l6", pairs: int | None = None, tokens: int = 8192, length: int = 64) -> None:
        self.model, self.tokenizer = load_model(name)
        rows = load_benchmark("glue", "mrpc")
        rows = rows.select(range(min(pairs or len(rows), len(rows))))
        self.sentences = [*rows["sentence1"], *rows["sentence2"]]
        self.labels = np.array(rows["label"])
        ids = token_sequences(self.tokenizer, "calibration", tokens=tokens, length=length)
        self.batches = [{"input_ids": batch} for batch in ids.split(16)]
        self.dense = embed(self.model, self.tokenizer, self.sentences)

    def fit(self, recipes: Sequence[Recipe]) -> list[Plan]:
        return fit_many(recipes, self.model, batches=self.batches)

    def score(self, plan: Plan | None) -> Scores:
        if plan is None:
            return self._scores(self.dense, None)
        with installed(self.model, plan), recorded(self.model) as counted:
            found = embed(self.model, self.tokenizer, self.sentences)
            return self._scores(found, scap_common.shares(summarise(self.model, counted())))

    @torch.no_grad()
    def run(self) -> None:
        for batch in self.batches:
            self.model(**batch)

    def _scores(self, found: Tensor, shares: dict[str, Any] | None) -> Scores:
        first, second = found.chunk(2)
        cosine = (first * second).sum(-1).numpy()
        moved = sum(1 - (a * b).sum(-1).double() for a, b in zip(found.chunk(2), self.dense.chunk(2), strict=True))
        right = judged(cosine, self.labels)
        return Scores(moved.clamp_min(0).tolist(), right.tolist(), [1.0] * len(right), shares,
                      {"auc": roc_auc(cosine, self.labels), "accuracy": float(right.mean())})


class Text:
    """A causal language model on running text. loss: a sequence's KL to the dense model; right: its summed log-likelihood."""

    scale = "log"

    def __init__(self, model: nn.Module, ids: Tensor, calibration: Tensor, every: int = 1) -> None:
        self.model, self.ids, self.calibration, self.every = model, ids, calibration, every

    def fit(self, recipes: Sequence[Recipe]) -> list[Plan]:
        return fit_many(recipes, self.model, ids=self.calibration, batch_size=4)

    def score(self, plan: Plan | None) -> Scores:
        found = evaluate(self.model, {} if plan is None else {"own": plan}, self.ids, every=self.every, batch_size=4)
        quality = found["dense" if plan is None else "own"]
        return Scores(list(quality.kl), [-n for n in quality.nll], [float(t) for t in quality.tokens],
                      None if plan is None else self._shares(plan), {"perplexity": quality.perplexity().value})

    @torch.no_grad()
    def run(self) -> None:
        for batch in self.ids.split(4):
            self.model(input_ids=batch, use_cache=False)

    def _shares(self, plan: Plan) -> dict[str, Any]:
        with installed(self.model, plan), recorded(self.model) as counted:
            self.run()
            return scap_common.shares(summarise(self.model, counted()))


class Images:
    """A classifier of images. loss: KL of its class probabilities to the dense ones; right: whether the class is right."""

    scale = "share"

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, calibration: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.batches = [{"pixel_values": batch} for batch in calibration.split(64)]
        self.dense = self._chances()

    def fit(self, recipes: Sequence[Recipe]) -> list[Plan]:
        return fit_many(recipes, self.model, batches=self.batches)

    def score(self, plan: Plan | None) -> Scores:
        if plan is None:
            return self._scores(self.dense, None)
        with installed(self.model, plan), recorded(self.model) as counted:
            found = self._chances()
            return self._scores(found, scap_common.shares(summarise(self.model, counted())))

    def run(self) -> None:
        self._chances()

    @torch.no_grad()
    def _chances(self) -> Tensor:
        """Log-probabilities of the classes, [images, classes]."""
        return torch.cat([self.model(pixel_values=x).logits.double().log_softmax(-1) for x in self.images.split(64)])

    def _scores(self, found: Tensor, shares: dict[str, Any] | None) -> Scores:
        apart = (self.dense.exp() * (self.dense - found)).sum(-1).clamp_min(0)
        right = (found.argmax(-1) == self.labels).double()
        return Scores(apart.tolist(), right.tolist(), [1.0] * len(right), shares, {"accuracy": float(right.mean())})


def embedded_text(name: str, sequences: int, length: int, every: int = 1) -> Text:
    """An embedded causal model on the book's evaluation text, calibrated on its calibration text."""
    model, tokenizer = load_model(name)
    calibration = token_sequences(tokenizer, "calibration", tokens=common.CALIBRATION["tokens"],
                                  length=common.CALIBRATION["length"], seed=common.CALIBRATION["seed"])
    return Text(model, common.evaluation_ids(tokenizer, sequences, length), calibration, every)
