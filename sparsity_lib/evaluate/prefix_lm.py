"""An lm-eval model that gives the log-likelihoods of lm-eval's own `hf` model, but reads shared prefixes once."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import torch
from lm_eval.models.huggingface import HFLM

from sparsity_lib.checks import count
from sparsity_lib.distributed import spread
from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.evaluate.bench_forward import PackedForward, Query
from sparsity_lib.evaluate.bench_quiet import quiet_lm_eval
from sparsity_lib.evaluate.bench_trie import BY_BLOCKS, WHOLE_PACK, batches, pack_sequences
from sparsity_lib.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: (the strings, context tokens, continuation tokens), as lm-eval hands them over.
TokenRequest = tuple[tuple[str, str], list[int], list[int]]
#: A packed forward pass may differ from a plain one by this share of what ignoring the tree structure would change.
SELF_TEST_SHARE = 0.05


class PrefixLM(HFLM):
    """lm-eval's `hf` model with the log-likelihood requests packed into prefix tries.

    Requests are tokenised, split and truncated by `HFLM` itself. Their sequences are packed into trees
    (:mod:`~sparsity_lib.evaluate.bench_trie`), each read in one forward pass, and the head is applied only at the
    positions that are asked for. Log-softmax is computed in float32 whatever the model's dtype, where `HFLM` stays in the
    model's dtype: in bfloat16 the two differ by rounding, by `HFLM`'s own half a nat at a sum of a hundred. Sums run in
    another order than in `HFLM`. A dense model's log-likelihoods then agree to 1e-4 in float32. Where sparsity chooses by a
    hard rule, a rounding error can grow until single answers change, under any two orders of sums, `HFLM`'s own batches
    included: `sparsity_lib.experiments.rounding` measures how far. Means over many documents hold.

    On a processor, models that use transformers' `sdpa` attention read the trees by blocks
    (:mod:`~sparsity_lib.evaluate.bench_attention`); `by_blocks` tells.

    At construction a small self-test compares packed with plain logits. If they differ, if the model cannot be run packed,
    or if it says that its sparsity depends on whole sequences (attribute `sparsity_needs_sequences`), requests go through
    `HFLM` unchanged, with one warning; `packed` and `why_not_packed` tell.

    Parameters
    ----------
    model, tokenizer
        A Hugging Face causal language model and its tokenizer. Neither is changed.
    batch_tokens
        Tokens of one forward pass, padding included. A longer tree still makes one.
    pack_tokens
        Most tokens of one tree; a single longer sequence still makes one. By default 4096 by blocks, 2048 otherwise.
    packed
        `False`: plain `HFLM` throughout.

    Raises
    ------
    SparsityError
        If the model has no language model head, or a size is not a whole number of at least 16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 4096,
        pack_tokens: int | None = None,
        max_length: int | None = None,
        packed: bool = True,
    ) -> None:
        self.batch_tokens = count("batch_tokens", batch_tokens, 16)
        if pack_tokens is not None:
            count("pack_tokens", pack_tokens, 16)
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise refuse("model", type(model).__name__, "a causal language model with a head", "benchmarks score text")
        if tokenizer.pad_token is None:
            tokenizer = copy.deepcopy(tokenizer)  # HFLM sets a padding token in place
        with quiet_lm_eval():
            super().__init__(
                pretrained=model, tokenizer=tokenizer, max_length=max_length, backend="causal",
                batch_size=min(8, max(1, self.batch_tokens // 256)),
            )
        self.why_not_packed = self._reason_against_packing() if packed else ""
        self.packed = packed and not self.why_not_packed
        self.by_blocks = self.packed and self.forward.by_blocks
        self.pack_tokens = pack_tokens or (4096 if self.by_blocks else 2048)
        if self.why_not_packed:
            warnings.warn(f"Benchmarks run unpacked (slower): {self.why_not_packed}", stacklevel=2)

    def _reason_against_packing(self) -> str:
        if getattr(self.model, "sparsity_needs_sequences", False):
            return "this model's sparsity depends on whole sequences."
        reason = ""
        for by_blocks in (True, False):
            try:
                self.forward = PackedForward(self.model, by_blocks)
                error, allowed = self_test(self.model, self.forward)
            except (SparsityError, TypeError, ValueError, RuntimeError, KeyError, IndexError) as failure:
                reason = f"{type(self.model).__name__} cannot be run on packed trees ({failure})."
                continue
            if error <= allowed:
                return ""
            reason = f"packed and plain log-probabilities differ by {error:.2g} where {allowed:.2g} is allowed."
        return reason

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) for each request, in order."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **options: object
    ) -> list[tuple[float, bool]]:
        if self.packed:
            work = self._score
        else:
            work = partial(super()._loglikelihood_tokens, disable_tqdm=disable_tqdm, **options)
        tokens = [len(context) + len(continuation) for _, context, continuation in requests]
        return spread(requests, work, tokens, same=[each[0] for each in requests])

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each request, in order."""
        work = partial(super().generate_until, disable_tqdm=disable_tqdm)
        return spread(requests, work, same=[str(each.args) for each in requests])

    def _score(self, requests: list[TokenRequest]) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) for each request, in order, packed."""
        sequences, queries = self._queries(requests)
        packs = pack_sequences(sequences, self.pack_tokens, BY_BLOCKS if self.by_blocks else WHOLE_PACK)
        answers: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        with bar(total=sum(map(len, packs)), desc="Scoring", unit="token", unit_scale=True) as progress:
            for group in batches(packs, self.batch_tokens, padded=not self.by_blocks):
                asked = [[query for index in pack.paths for query in queries[index]] for pack in group]
                for request, logp, greedy in self.forward.score(group, asked):
                    answers[request] = (logp, bool(greedy))
                progress.update(sum(map(len, group)))
        return answers

    def _queries(self, requests: list[TokenRequest]) -> tuple[list[tuple[int, ...]], dict[int, list[Query]]]:
        """The distinct sequences that have to be read, and by index the continuations asked from each.

        As in `HFLM`, the last token is never read, and a sequence too long for the model loses its first tokens.
        """
        index_of: dict[tuple[int, ...], int] = {}
        queries: dict[int, list[Query]] = defaultdict(list)
        for request, (_, context, continuation) in enumerate(requests):
            if not context or not continuation or len(continuation) > self.max_length:
                raise SparsityError(
                    f"Request {request} has {len(context)} context and {len(continuation)} continuation tokens: expected at "
                    f"least one of each and a continuation of at most {self.max_length}."
                )
            read = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            sequence = index_of.setdefault(read, len(index_of))
            queries[sequence].append(Query(request, sequence, len(read) - len(continuation), tuple(continuation)))
        return list(index_of), queries


@torch.inference_mode()
def self_test(model: PreTrainedModel, forward: PackedForward) -> tuple[float, float]:
    """(largest difference between packed and plain log-probabilities, largest that is allowed).

    Two short sequences with a common prefix are read packed, apart, in a padded batch as `HFLM` reads them, and (wrongly)
    one after the other. Packing has to be much closer to the truth than the wrong way, or within rounding; by as much as
    the padded batch differs, as low precision, a hard selection or a random mask make it, packing may differ too.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(1000, forward.config.vocab_size), (24,), generator=generator).tolist()
    first, second = tuple(ids[:14]), tuple(ids[:8] + ids[14:])
    (pack,) = pack_sequences([first, second], 4096)
    plain = torch.cat([_log_probabilities(model, [s])[0][8:] for s in (first, second)])
    batched = torch.cat([row[8:] for row in _log_probabilities(model, [first, second])])
    states = forward.hidden([pack])
    nodes = torch.cat([torch.from_numpy(pack.paths[index][8:]) for index in (0, 1)]).to(states.device)
    packed = forward.logits(states[nodes]).log_softmax(-1)
    (joined,) = _log_probabilities(model, [tuple(ids)])
    wrong = torch.cat([joined[8:14], joined[14:]])
    rounding = 4 * torch.finfo(forward.head.weight.dtype).eps * float(plain.abs().max())
    allowed = max(rounding, SELF_TEST_SHARE * _furthest(wrong, plain)) + 2 * _furthest(batched, plain)
    return _furthest(packed, plain), allowed


def _furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _log_probabilities(model: PreTrainedModel, sequences: list[tuple[int, ...]]) -> list[torch.Tensor]:
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences], device=model.device)
    logits = model(ids, use_cache=False).logits.float()
    return [row[: len(sequence)].log_softmax(-1) for row, sequence in zip(logits, sequences, strict=True)]
