"""Arithmetic on quantized values; needs nothing but torch."""

from lightning_qnoise.ops.fake_quant_noise import fake_quant_noise
from lightning_qnoise.ops.int8 import has_int8, int8_linear
from lightning_qnoise.ops.int8_conv import int8_conv2d, int8_kernel
from lightning_qnoise.ops.int8_grid import Int8Grid, prepare_grid
from lightning_qnoise.ops.int8_weight import Int8Weight, prepare_int8
from lightning_qnoise.ops.int_linear import int_linear
from lightning_qnoise.ops.kmeans_assign import kmeans_assign
from lightning_qnoise.ops.pq import pq_decode, pq_embedding, pq_linear

__all__ = [
    "Int8Grid",
    "Int8Weight",
    "fake_quant_noise",
    "has_int8",
    "int8_conv2d",
    "int8_kernel",
    "int8_linear",
    "int_linear",
    "kmeans_assign",
    "pq_decode",
    "pq_embedding",
    "pq_linear",
    "prepare_grid",
    "prepare_int8",
]
