"""The rounding that every grid of integers shares."""

from __future__ import annotations

import torch
from torch import Tensor


def affine_steps(values: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """Return `clamp(round(values / scale) + zero_point) - zero_point`, without a gradient.

    Halves go to the even number, before the zero point is added, as in ONNX's QuantizeLinear and in torch.

    Args:
        values: Float, of any shape.
        scale: float32 that broadcasts to it.
        zero_point: Whole numbers in `[0, 2**bits)`: float32 that broadcasts to it, or one number, which is faster.
        bits: Bits per code.

    Returns:
        New float32 whole numbers in `[-zero_point, 2**bits - 1 - zero_point]`, in the layout of `values`.

    Example:
        >>> affine_steps(torch.tensor([-9.0, 0.0, 0.75, 9.0]), torch.tensor(0.5), 8, bits=4)
        tensor([-8.,  0.,  2.,  7.])
    """
    values = values.detach() if values.requires_grad else values
    steps = ((values if values.dtype is torch.float32 else values.float()) / scale).round_()
    top = 2**bits - 1
    if isinstance(zero_point, int):
        return steps.clamp_(-zero_point, top - zero_point)
    return steps.add_(zero_point).clamp_(0, top).sub_(zero_point)


def is_zero(zero_point: Tensor | int) -> bool:
    """Whether a zero point is known to be zero, which spares passes over the values.

    Example:
        >>> is_zero(0), is_zero(3), is_zero(torch.zeros(2))  # numbers of a tensor are not looked at
        (True, False, False)
    """
    return isinstance(zero_point, int) and zero_point == 0
