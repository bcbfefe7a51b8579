"""Presets: the papers' settings, adapted to one weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lightning_qnoise.schemes import PQ, Int, Scheme, matrix_shape
from lightning_qnoise.weights import Weight

_BLOCKS_PER_CENTROID = 4  # below this the codebook costs more than it gains (Stock et al., threshold on K)
_LEAST_CENTROIDS = 32  # a first convolution of 8 codewords cost 10 points of accuracy to save 1 % of the bytes


def _product(weight: Weight) -> Scheme:
    """PQ with the block sizes of Fan et al.: 8, attention 4, 3x3 kernels 9, 1x1 convolutions 4; K = 256.

    The block size is the largest divisor up to that, K at most a quarter of the blocks, and a layer too small for 32
    codewords becomes int8.
    """
    rows, cols = matrix_shape(weight.shape)
    wanted = 8
    if len(weight.shape) > 2:
        wanted = 9 if math.prod(weight.shape[2:]) > 1 else 4
    elif weight.is_attention:
        wanted = 4
    block_size = max(size for size in range(1, wanted + 1) if cols % size == 0)
    largest = rows * cols // block_size // _BLOCKS_PER_CENTROID
    if largest < _LEAST_CENTROIDS:
        return Int(bits=8)
    return PQ(block_size=block_size, n_centroids=min(256, 2 ** (largest.bit_length() - 1)))


def _product_int8(weight: Weight) -> Scheme:
    """The same with int8 codebooks, and int8 for what enters the layers (Fan et al., section 3.4)."""
    scheme = _product(weight)
    if isinstance(scheme, PQ):
        return replace(scheme, codebook=Int(8, granularity="tensor"), activation=Int(8))
    return Int(8, activation=Int(8))


QUANTIZING_INPUTS = {"ipq+int8"}
PRESETS: dict[str, Callable[[Weight], Scheme]] = {
    "int8": lambda weight: Int(bits=8),
    "int4": lambda weight: Int(bits=4),
    "pq": _product,
    "ipq": _product,
    "ipq+int8": _product_int8,
}
"""Name -> the scheme for one weight; raises ValueError with the reason where there is none."""
