"""The small networks trained for this book, as the SCAP chapter's experiments take them: name -> what opens it.

Those that are not kept in results/ are left out, and the tables show the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sparsity_lib import results
from sparsity_lib.assets.models import load_model
from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments.scap_networks import Images, Network, embedded_text


@dataclass(frozen=True)
class Small:
    """What a network is in words; whether its FFN has a gate, whether the paper prunes its attention's inputs as well, and
    whether its blocks hold a mixer instead of attention and FFN."""

    what: str
    gated: bool = False
    attention: bool = False
    mixer: bool = False


SMALL = {
    "small-gpt2": Small("GPT-2's architecture"),
    "small-falcon": Small("Falcon's architecture, attention and FFN side by side"),
    "small-mpt": Small("MPT's architecture, without biases"),
    "small-vit": Small("vision transformer, 8 x 8 digits", attention=True),
    "small-llama": Small("Llama's architecture", gated=True),
    "small-mixtral": Small("Mixtral's architecture, 2 of 4 experts a token", gated=True),
    "small-mamba2": Small("Mamba2's architecture, input and output projections", gated=True, mixer=True),
}
#: Evaluation text of the language models.
TEXT = {"sequences": 32, "length": 256}


def there() -> list[str]:
    """Names of those that are kept."""
    try:
        return [name for name in SMALL if name in results.load("smallnets").data]
    except SparsityError:
        return []


def openers(gated: bool | None = None) -> dict[str, Callable[[], Network]]:
    """Name -> a function that opens the network; those with a gate, without one, or all."""
    return {name: partial(opened, name) for name in there() if gated is None or SMALL[name].gated == gated}


def opened(name: str) -> Network:
    """One network: a language model on the book's texts, the vision transformer on the digits it was not trained on."""
    if name != "small-vit":
        return embedded_text(name, **TEXT)
    from sparsity_lib.assets.digits import digits

    model, _ = load_model(name)
    held, seen = digits("evaluation"), digits("training")
    return Images(model, held["pixel_values"], held["labels"], seen["pixel_values"])
