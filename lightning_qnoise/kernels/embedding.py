"""Rows of the weight of codes and codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.kernels.common import TL_DTYPES, check_codes
from lightning_qnoise.kernels.decode import launch_decode


def pq_embedding(ids: Tensor, codes: Tensor, codebook: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the rows `ids` of the weight, `[*ids.shape, groups * d]`.

    An id that names no row makes one of NaN; to raise, the host would have to wait for the GPU.

    Args:
        ids: int32 or int64, of any shape and strides.
        codes: uint8, int16 or int32 `[rows, groups]`, of any strides.
        codebook: Float16, bfloat16 or float32 `[K, d]`.
        dtype: One of these; that of the codebook by default.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
    """
    check_codes(codes, codebook)
    dtype = dtype or codebook.dtype
    if ids.dtype not in (torch.int32, torch.int64) or dtype not in TL_DTYPES:
        raise TypeError(f"ids are in int32 or int64, rows in float16, bfloat16 or float32, got {ids.dtype} and {dtype}")
    if ids.numel() and not len(codes):
        raise ValueError(f"there is no row, but {ids.numel()} are asked for")
    out = codebook.new_empty(*ids.shape, codes.shape[1] * codebook.shape[1], dtype=dtype)
    return launch_decode(codes, codebook.to(dtype), ids.contiguous(), out)
