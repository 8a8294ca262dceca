"""A small byte-level BPE tokenizer, trained on the training texts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsity_lib.checks import count

#: Ends every document; the only token that stands for no bytes.
END = "<|endoftext|>"


def train_tokenizer(passages: Iterable[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding on GPT-2's pieces of text (Sennrich et al. 2016; Radford et al. 2019), the same at every run.

    Parameters
    ----------
    passages
        The text to learn from.
    vocabulary
        Tokens, the 256 bytes and the end of a document among them.
    max_length
        Tokens that the models it is for were trained on; longer inputs make the tokenizer warn.
    """
    count("vocabulary", vocabulary, minimum=257)
    count("max_length", max_length)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(passages, learner)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=max_length)


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """How many bytes of text each token of a byte-level tokenizer stands for, [vocabulary]; special tokens none."""
    found = torch.zeros(len(tokenizer), dtype=torch.long)
    for token, place in tokenizer.get_vocab().items():
        found[place] = 0 if place in tokenizer.all_special_ids else len(token)  # one character a byte
    return found
