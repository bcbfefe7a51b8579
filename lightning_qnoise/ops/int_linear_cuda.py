"""Routes of `int_linear` on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops import int_linear_slices
from lightning_qnoise.ops.int_matrix import IntMatrix

KERNEL_ROWS = 256  # the most rows of x for which the kernel runs; above, a decoded slice costs less than its product
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_BITS = (4, 8)  # with rows of whole bytes
KERNEL_GROUP = 32  # inputs of which a group has to be a multiple


def choose_route(rows: int, dtype: torch.dtype, bits: int, n_in: int, groups: int = 1) -> str:
    """Return `"kernel"`, which decodes in registers, or `"slices"`, which decodes rows for cuBLAS.

    Args:
        rows: Rows of the input, all its leading dimensions together.
        dtype: Its dtype.
        bits: Bits per code.
        n_in: Inputs.
        groups: Groups of inputs, each with a scale.

    Example:
        >>> [choose_route(rows, torch.float16, 8, 4096) for rows in (1, 257)], choose_route(1, torch.float16, 3, 4096)
        (['kernel', 'slices'], 'slices')
    """
    fits = rows <= KERNEL_ROWS and dtype in KERNEL_DTYPES and bits in KERNEL_BITS and n_in * bits % 8 == 0
    return "kernel" if fits and (groups == 1 or n_in // groups % KERNEL_GROUP == 0) else "slices"


def linear(x: Tensor, matrix: IntMatrix, bias: Tensor | None = None) -> Tensor:
    """Return `x @ matrix.T + bias`, `[rows, n_out]`, for `x [rows, n_in]`."""
    codes, scale, zero_point, bits, n_out, n_in = matrix
    if choose_route(len(x), x.dtype, bits, n_in, scale.shape[1]) == "slices" or not x.numel() or not n_out:
        return int_linear_slices.linear(x, matrix, bias)
    from lightning_qnoise.kernels.int_gemm import int_gemm

    rows = codes.view(n_out, -1)
    zero_point = None if zero_point is None else zero_point.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in KERNEL_DTYPES else bias.float()).contiguous()
    return int_gemm(x, rows, scale.contiguous(), zero_point, bits, bias)
