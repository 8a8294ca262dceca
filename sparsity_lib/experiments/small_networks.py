"""The small networks trained for this book, as the SCAP chapter's experiments take them: name -> what opens it.

A network that is not there (not trained, or the library without it) is left out, and the tables show those that are.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsity_lib.experiments.scap_networks import Network


def plain() -> dict[str, Callable[[], Network]]:
    """Networks whose FFN has no gate."""
    return {}


def others() -> dict[str, Callable[[], Network]]:
    """Mixtures of experts, state-space and vision networks for the coverage table."""
    return {}


def what(name: str) -> str:
    """What kind of network it is, in words."""
    return name


def centered(name: str) -> bool:
    """Whether its FFN has no gate, so that the paper would centre its inputs."""
    return name in plain()


def attention(name: str) -> bool:
    """Whether the paper prunes the inputs of its attention too (vision networks)."""
    return False
