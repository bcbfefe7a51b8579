"""Arithmetic on quantized values; needs nothing but torch."""

from lightning_qnoise.ops.int8 import Int8Weight, has_int8, int8_linear, prepare_int8
from lightning_qnoise.ops.pq import pq_decode, pq_embedding, pq_linear

__all__ = [
    "Int8Weight",
    "has_int8",
    "int8_linear",
    "pq_decode",
    "pq_embedding",
    "pq_linear",
    "prepare_int8",
]
