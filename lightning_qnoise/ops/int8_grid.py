"""The grid of what is multiplied in integers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_qnoise.ops.int8_weight import Int8Weight


class Int8Grid(NamedTuple):
    """The grid of what enters a layer, `x = (code - zero_point) * scale`, ready for one weight; from `prepare_grid`.

    Attributes:
        scale: float32, `[]` for all of `x`, or one per row of it, `[rows, 1]`.
        offset: `zero_point - 2**(bits - 1)`, whole numbers: float32 of the shape of `scale`, or one number.
        bits: Bits per code.
        factor: float32 `[out]`: what a product of codes is multiplied by. None of many scales.
        shift: float32 `[out]`: what is added then. None of many scales.
    """

    scale: Tensor
    offset: Tensor | int
    bits: int
    factor: Tensor | None
    shift: Tensor | None

    def rows(self, part: slice) -> Int8Grid:
        """Return the grid of some rows."""
        if not self.scale.ndim:
            return self
        offset = self.offset[part] if isinstance(self.offset, Tensor) else self.offset
        return self._replace(scale=self.scale[part], offset=offset)


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
    if isinstance(zero_point, Tensor) and scale.shape != zero_point.shape:
        raise ValueError(f"scale {list(scale.shape)} and zero point {list(zero_point.shape)} have different shapes")
    scale, offset = scale.reshape(-1, 1) if scale.ndim else scale, zero_point - 2 ** (bits - 1)
    if isinstance(offset, Tensor):
        offset = offset.view_as(scale)
    if scale.ndim:
        return Int8Grid(scale, offset, bits, None, None)
    factor = scale * weight.scale
    return Int8Grid(scale, offset, bits, factor, weight.sums * factor * -offset)
