"""The grid of what is multiplied in integers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_qnoise.ops.int8_weight import Int8Weight


class Int8Grid(NamedTuple):
    """The grid of what enters a layer, `x = (code - zero_point) * scale`, ready for one weight; from `prepare_grid`.

    Attributes:
        scale: float32, `[]` for all of `x`, or one per row of it, `[..., 1]`.
        zero_point: float32 whole numbers in `[0, 2**bits)`, of the shape of `scale`.
        bits: Bits per code.
        middle: `2**(bits - 1)`, float32 `[]`: a tensor, since a number would be made one in every call.
        offset: `zero_point - middle`.
        factor: Of one scale, float32 `[out]`: what a product of codes is multiplied by. Of many, None, unless the rows
            stand for samples: `[n, 1, 1, out]`.
        shift: Of the same shape: what is added then.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    middle: Tensor
    offset: Tensor
    factor: Tensor | None
    shift: Tensor | None

    def rows(self, part: slice) -> Int8Grid:
        """Return the grid of some rows."""
        if not self.scale.ndim:
            return self
        parts = (None if value is None else value[part] for value in (self.factor, self.shift))
        return Int8Grid(self.scale[part], self.zero_point[part], self.bits, self.middle, self.offset[part], *parts)


def prepare_grid(weight: Int8Weight, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Int8Grid:
    """Prepare the grid of what is multiplied by a weight: once for all inputs, if it is static.

    Args:
        weight: From `prepare_int8`.
        scale: float32, `[]` or `[..., 1]` per row of the input.
        zero_point: float32 whole numbers in `[0, 2**bits)`, of the shape of `scale`.
        bits: Bits per code, at most 8.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> import torch
        >>> from lightning_qnoise.ops import prepare_int8
        >>> weight = prepare_int8(torch.tensor([[130, 126]]), torch.tensor([0.5]), None)
        >>> prepare_grid(weight, torch.tensor(3.0), torch.tensor(128.0)).factor
        tensor([1.5000])
    """
    if scale.shape != zero_point.shape:
        raise ValueError(f"scale {list(scale.shape)} and zero point {list(zero_point.shape)} have different shapes")
    if scale.ndim:
        scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    middle = scale.new_full((), 2 ** (bits - 1))
    offset = zero_point - middle
    if scale.ndim:
        return Int8Grid(scale, zero_point, bits, middle, offset, None, None)
    factor = scale * weight.scale
    return Int8Grid(scale, zero_point, bits, middle, offset, factor, (weight.sums * offset).mul_(factor).neg_())
