"""The grid of what is multiplied in integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qnoise.ops.int8_weight import Int8Weight


class Int8Grid(NamedTuple):
    """The grid of what enters a layer, `x = (code - zero_point) * scale`, ready for one weight; from `prepare_grid`.

    Attributes:
        scale: float32, `[]` for all of `x`, or one per row of it, `[rows, 1]`.
        zero_point: Whole numbers in `[0, 2**bits)`: float32 of the shape of `scale`, or one number.
        bits: Bits per code.
        offset: `zero_point - 2**(bits - 1)` of many scales; None if all are zero, or of one scale.
        factor: float32 `[out]`: what a product of codes is multiplied by. None of many scales.
        shift: float32 `[out]`: what is added then. None of many scales.
    """

    scale: Tensor
    zero_point: Tensor | int
    bits: int
    offset: Tensor | None
    factor: Tensor | None
    shift: Tensor | None

    def rows(self, part: slice) -> Int8Grid:
        """Return the grid of some rows."""
        if not self.scale.ndim:
            return self
        if isinstance(self.zero_point, int) or self.offset is None:
            return self._replace(scale=self.scale[part])
        return self._replace(scale=self.scale[part], zero_point=self.zero_point[part], offset=self.offset[part])


def prepare_grid(weight: Int8Weight, scale: Tensor, zero_point: Tensor | int, bits: int = 8) -> Int8Grid:
    """Prepare the grid of what is multiplied by a weight: once for all inputs, if it is static.

    Args:
        weight: From `prepare_int8`.
        scale: float32, `[]` or `[..., 1]` per row of the input.
        zero_point: Whole numbers in `[0, 2**bits)`: float32 of the shape of `scale`, or one number.
        bits: Bits per code, at most 8.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> import torch
        >>> from lightning_qnoise.ops import prepare_int8
        >>> weight = prepare_int8(torch.tensor([[130, 126]]), torch.tensor([0.5]), None)
        >>> prepare_grid(weight, torch.tensor(3.0), 128).factor
        tensor([1.5000])
    """
    middle = 2 ** (bits - 1)
    if isinstance(zero_point, Tensor):
        if scale.shape != zero_point.shape:
            raise ValueError(f"scale {list(scale.shape)} and zero point {list(zero_point.shape)} have different shapes")
        zero_point = zero_point.reshape(-1, 1) if scale.ndim else zero_point
    if scale.ndim:
        scale = scale.reshape(-1, 1)
        offset = None
        if isinstance(zero_point, Tensor) or zero_point != middle:
            offset = torch.zeros_like(scale) + (zero_point - middle)
        return Int8Grid(scale, zero_point, bits, offset, None, None)
    factor = scale * weight.scale
    return Int8Grid(scale, zero_point, bits, None, factor, weight.sums * factor * (middle - zero_point))
