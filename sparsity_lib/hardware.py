"""A model of hardware for N:M activation pruning: bytes moved, operations, and the time a roofline gives them.

Nothing here is measured. It says what a linear layer would cost on a machine of given bandwidth and peaks: decoding, where
the weights of dropped channels are left unread, which any machine can do; and prefill on a unit that multiplies compressed
activations, which exists for 2:4 only. Launches, caches and imperfect overlap are left out: times are lower bounds.

    layer, machine = Layer(outputs=14336, inputs=4096), Machine(bandwidth=3.35e12, peak=989e12, vector_peak=67e12)
    speedup(prefill(layer, 8, 16, tokens=4096), dense(layer, tokens=4096), machine)
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsity_lib.checks import count, positive
from sparsity_lib.nm_facts import check_nm, metadata_bits


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes a second. peak: operations a second of matrix products (a multiply-add is two). vector_peak: operations
    a second outside of them, which selecting is made of. Model parameters, not measurements.
    """

    bandwidth: float
    peak: float
    vector_peak: float

    def __post_init__(self) -> None:
        for name in ("bandwidth", "peak", "vector_peak"):
            positive(name, getattr(self, name))


@dataclass(frozen=True)
class Layer:
    """A linear layer W [outputs, inputs]; weight_bytes, activation_bytes: bytes of one entry (0.5 is 4 bits)."""

    outputs: int
    inputs: int
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0

    def __post_init__(self) -> None:
        for name in ("outputs", "inputs"):
            count(name, getattr(self, name))
        for name in ("weight_bytes", "activation_bytes"):
            positive(name, getattr(self, name))


@dataclass(frozen=True)
class Work:
    """One pass over the data. flops: of matrix products; vector_ops: others. Passes follow each other."""

    name: str
    bytes: float
    flops: float = 0.0
    vector_ops: float = 0.0

    def seconds(self, machine: Machine) -> float:
        """Roofline time of the model: the slowest of memory, matrix unit and vector unit, which overlap."""
        return max(self.bytes / machine.bandwidth, self.flops / machine.peak, self.vector_ops / machine.vector_peak)


Passes = tuple[Work, ...]


def dense(layer: Layer, tokens: int = 1) -> Passes:
    """The layer without pruning: W, x and y go through memory once."""
    _tokens(tokens)
    weights = layer.outputs * layer.inputs
    moved = weights * layer.weight_bytes + tokens * (layer.inputs + layer.outputs) * layer.activation_bytes
    return (Work("product", moved, 2.0 * tokens * weights),)


def decode(layer: Layer, n: int, m: int, tokens: int = 1, select_ops: float | None = None) -> Passes:
    """A model of decoding: W's columns are read for the channels that any of the tokens keeps; multiplied for those alone.

    One pass, for the choice is made inside it, from x as it is read. Tokens are taken to choose independently, so that
    1 - (1 - n/m)^tokens of the columns are read; real tokens agree more. Needs no support for N:M: any mask saves the same.

    Parameters
    ----------
    select_ops
        Vector operations an entry of x to score and select; by default one comparison with each of its group.
    """
    check_nm(n, m)
    _tokens(tokens)
    read = layer.outputs * layer.inputs * (1 - (1 - n / m) ** tokens)
    moved = read * layer.weight_bytes + tokens * (layer.inputs + layer.outputs) * layer.activation_bytes
    flops = 2.0 * tokens * layer.outputs * layer.inputs * n / m
    return (Work("product", moved, flops, tokens * layer.inputs * _ops(select_ops, m)),)


def prefill(layer: Layer, n: int, m: int, tokens: int, select_ops: float | None = None, fused: bool = False) -> Passes:
    """A model of prefill on a unit with support for n:m, which is hypothetical for all but 2:4.

    Selecting reads x and writes n/m of it with log2 C(m, n) / m bits of metadata an element; the product then moves the
    compressed x and all of W, and does n/m of the operations: the unit is taken to skip all that is dropped.

    Parameters
    ----------
    tokens
        Of the prompt, or of all prompts together.
    select_ops
        As in `decode`.
    fused
        What produces x selects as well: x is neither written nor read whole, and what is compressed is written instead.
    """
    check_nm(n, m)
    _tokens(tokens)
    entries = tokens * layer.inputs
    compressed = entries * (layer.activation_bytes * n / m + metadata_bits(n, m) / 8)
    selecting = 0.0 if fused else entries * layer.activation_bytes + compressed
    weights = layer.outputs * layer.inputs
    moved = weights * layer.weight_bytes + compressed + tokens * layer.outputs * layer.activation_bytes
    return (Work("select", selecting, vector_ops=entries * _ops(select_ops, m)),
            Work("product", moved, 2.0 * tokens * weights * n / m))


def seconds(passes: Passes, machine: Machine) -> float:
    """Roofline time of the model: the passes one after the other."""
    return sum(each.seconds(machine) for each in passes)


def speedup(passes: Passes, over: Passes, machine: Machine) -> float:
    """How many times faster than `over` the model says."""
    return seconds(over, machine) / seconds(passes, machine)


def _ops(select_ops: float | None, m: int) -> float:
    return float(m) if select_ops is None else positive("select_ops", select_ops)


def _tokens(tokens: int) -> None:
    count("tokens", tokens)
