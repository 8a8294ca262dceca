"""The hardware model by hand, and the orders that it must give."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_lib import SparsityError
from sparsity_lib.hardware import Layer, Machine, Work, decode, dense, metadata_bits, prefill, seconds, speedup

LAYER, MACHINE = Layer(outputs=1000, inputs=64), Machine(bandwidth=1e3, peak=1e6, vector_peak=1e4)


def test_metadata_is_the_papers():
    for (n, m), bits in {(2, 4): 0.646, (4, 8): 0.766, (8, 16): 0.853, (16, 32): 0.911, (3, 3): 0.0}.items():
        assert metadata_bits(n, m) == pytest.approx(bits, abs=5e-4)


def test_bytes_and_operations_by_hand():
    (product,) = dense(LAYER, tokens=3)
    assert product == Work("product", 2 * 64000 + 2 * 3 * 1064, 2 * 3 * 64000)
    (half,) = decode(LAYER, 2, 4)
    assert half.bytes == 2 * 32000 + 2 * 1064 and half.flops == 64000 and half.vector_ops == 64 * 4
    (two,) = decode(Layer(1000, 64, weight_bytes=0.5), 2, 4, tokens=2, select_ops=7)
    assert two.bytes == 0.5 * 64000 * 0.75 + 2 * 2 * 1064 and two.vector_ops == 2 * 64 * 7
    select, product = prefill(LAYER, 8, 16, tokens=10)
    compressed = 640 * (2 * 0.5 + math.log2(12870) / 16 / 8)
    assert select.bytes == pytest.approx(640 * 2 + compressed) and select.vector_ops == 640 * 16 and select.flops == 0
    assert product.bytes == pytest.approx(2 * 64000 + compressed + 2 * 10000) and product.flops == 64000 * 10
    assert prefill(LAYER, 8, 16, tokens=10, fused=True)[0].bytes == 0


def test_time_is_the_slowest_of_three_and_passes_add_up():
    assert Work("", 2000).seconds(MACHINE) == 2 and Work("", 2000, 4e6).seconds(MACHINE) == 4
    assert Work("", 2000, 4e6, 9e4).seconds(MACHINE) == 9
    assert seconds((Work("", 2000), Work("", 0, 4e6)), MACHINE) == 6
    assert speedup((Work("", 2000),), (Work("", 6000),), MACHINE) == 3


def test_where_time_goes():
    """Decoding of one token is bound by the bytes: half of them, twice the speed; a long prompt by the operations."""
    layer, machine = Layer(14336, 4096), Machine(bandwidth=3e12, peak=1e15, vector_peak=6e13)
    assert speedup(decode(layer, 8, 16), dense(layer), machine) == pytest.approx(2, rel=1e-3)
    long = 16384
    assert 1.6 < speedup(prefill(layer, 2, 4, long), dense(layer, long), machine) < 2
    assert speedup(prefill(layer, 2, 4, 4), dense(layer, 4), machine) < 1  # all of W is read, and selecting comes on top
    assert decode(layer, 8, 16, tokens=16)[0].bytes > 0.99 * dense(layer, 16)[0].bytes  # together they keep nearly all


@given(st.integers(1, 32), st.integers(0, 32), st.integers(1, 200))
def test_more_kept_never_costs_less(n, more, tokens):
    m = n + more
    assert decode(LAYER, m, m, tokens)[0].bytes == pytest.approx(dense(LAYER, tokens)[0].bytes)
    assert prefill(LAYER, m, m, tokens)[1].bytes == pytest.approx(dense(LAYER, tokens)[0].bytes)
    if more:
        for way in (decode, prefill):
            fewer, rest = way(LAYER, n, m, tokens)[-1], way(LAYER, n + 1, m, tokens)[-1]
            assert fewer.flops < rest.flops and (way is prefill or fewer.bytes <= rest.bytes)


@pytest.mark.parametrize("call, message", [
    (lambda: Machine(0, 1, 1), "bandwidth = 0"), (lambda: Machine(1, math.inf, 1), "peak = inf"),
    (lambda: Layer(0, 4), "outputs = 0"),
    (lambda: Layer(4, 4, weight_bytes=-1), "weight_bytes = -1"), (lambda: decode(LAYER, 5, 4), r"n = 5.*\[1, m = 4\]"),
    (lambda: prefill(LAYER, 2, 4, 0), "tokens = 0"), (lambda: dense(LAYER, True), "tokens = True"),
    (lambda: decode(LAYER, 2, 4, select_ops=0), "select_ops = 0"), (lambda: metadata_bits(0, 4), "n = 0"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(SparsityError, match=message):
        call()
