"""Arithmetic on quantized values; needs nothing but torch."""

from lightning_qnoise.ops.affine import affine_steps, is_zero
from lightning_qnoise.ops.dense_conv import DenseKernel, dense_conv2d, prepare_dense_conv2d
from lightning_qnoise.ops.dense_layout import Layout, dense_layout
from lightning_qnoise.ops.fake_quant_noise import fake_quant_noise
from lightning_qnoise.ops.int8 import int8_linear
from lightning_qnoise.ops.int8_conv import int8_conv2d
from lightning_qnoise.ops.int8_grid import Int8Grid, prepare_grid
from lightning_qnoise.ops.int8_kernel import Int8Kernel, prepare_int8_conv2d
from lightning_qnoise.ops.int8_weight import Int8Weight, int8_backend, prepare_int8
from lightning_qnoise.ops.int_linear import int_linear
from lightning_qnoise.ops.kmeans_assign import kmeans_assign
from lightning_qnoise.ops.matrix_conv import pixelwise_conv2d, unfolded_conv2d
from lightning_qnoise.ops.pq import pq_decode, pq_embedding, pq_linear

__all__ = [
    "DenseKernel",
    "Int8Grid",
    "Int8Kernel",
    "Int8Weight",
    "Layout",
    "affine_steps",
    "dense_conv2d",
    "dense_layout",
    "fake_quant_noise",
    "int8_backend",
    "int8_conv2d",
    "int8_linear",
    "int_linear",
    "is_zero",
    "kmeans_assign",
    "pixelwise_conv2d",
    "pq_decode",
    "pq_embedding",
    "pq_linear",
    "prepare_dense_conv2d",
    "prepare_grid",
    "prepare_int8",
    "prepare_int8_conv2d",
    "unfolded_conv2d",
]
