"""Decoding at the speed of the bytes that are read."""

from sparsity_lib.decode.decoder import Decoder
from sparsity_lib.decode.sources import ModelSource, RandomSource

__all__ = ["Decoder", "ModelSource", "RandomSource"]
