"""The weight of integer products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MAX_IN = 2**31 // 2**14 - 1  # the largest sum of products of two signed bytes that fits in an int32


class Int8Weight(NamedTuple):
    """The matrix of a layer, ready for `int8_linear` or `int8_conv2d`.

    Attributes:
        matrix: int8 `[in, out]`, contiguous: the codes less `2**(bits - 1)`.
        scale: float32 `[out]`.
        sums: float32 `[out]`, whole numbers: `code - zero_point` summed over `in`.
        zero_point: float32 `[out]`, whole numbers: the zero points less `2**(bits - 1)`; None if all are zero.
    """

    matrix: Tensor
    scale: Tensor
    sums: Tensor
    zero_point: Tensor | None

    def to(self, device: torch.device | str) -> Int8Weight:
        """Return the weight on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return Int8Weight(self.matrix.to(device), self.scale.to(device), self.sums.to(device), zero_point)


def prepare_int8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8) -> Int8Weight:
    """Lay out a quantized matrix, `(codes - zero_point) * scale`, for `int8_linear`.

    Args:
        codes: Integers `[out, in]` in `[0, 2**bits)`, of any integer dtype.
        scale: Float32, one per row or one in all.
        zero_point: Integers, one per row or one in all; None stands for `2**(bits - 1)`, which is the fastest.
        bits: Bits per code, at most 8.

    Raises:
        ValueError: A row is too long for sums in 32 bits, or has several scales.

    Example:
        >>> prepare_int8(torch.tensor([[0, 128, 255]]), torch.ones(1, 1), None).matrix.tolist()
        [[-128], [0], [127]]
    """
    n_out, n_in = codes.shape
    if n_in > _MAX_IN:
        raise ValueError(f"int8 sums of {n_in} products overflow 32 bits; at most {_MAX_IN} inputs are possible")
    if scale.numel() not in (1, n_out):
        raise ValueError(f"int8 execution needs one scale per row, got {scale.numel()} scales for {n_out} rows")
    middle = 2 ** (bits - 1)
    matrix = (codes.short() - middle).to(torch.int8)
    sums = matrix.sum(dim=1, dtype=torch.int32)
    if zero_point is not None:
        zero_point = (zero_point.int() - middle).reshape(-1).expand(n_out)
        sums = sums - n_in * zero_point
        zero_point = zero_point.float() if zero_point.any() else None
    matrix = matrix.t().clone(memory_format=torch.contiguous_format)  # strides that `_int_mm` takes for one row, too
    return Int8Weight(matrix, scale.float().reshape(-1).expand(n_out), sums.float(), zero_point)
