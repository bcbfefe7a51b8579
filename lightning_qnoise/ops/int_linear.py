"""A product with a matrix of packed integers, of which no float copy is ever whole."""

from __future__ import annotations

from torch import Tensor

from lightning_qnoise.ops import int_linear_library  # noqa: F401  registers the operators
from lightning_qnoise.ops.library import OPS


def int_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
    out: int | None = None,
) -> Tensor:
    """Return `x @ W.T + bias` for `W = (codes - zero_point) * scale`. Under autocast it casts as `F.linear` does.

    It is `torch.ops.lightning_qnoise.int_linear`, opaque to `torch.compile`, where `out` has to be given.

    Args:
        x: Float `[..., in]`.
        codes: uint8 `[ceil(out * in * bits / 8)]`: row-major, without gaps, the first code in a byte's lowest bits.
        scale: float32 `[1, 1]` for the whole matrix, or `[out, groups]`; a group is `in / groups` consecutive inputs.
        zero_point: uint8 of the shape of `scale`, or None for `2**(bits - 1)`.
        bias: Float `[out]`, of any dtype, or None.
        bits: Bits per code, 2 to 8.
        out: Outputs; None takes the rows of `scale`, which is wrong where one scale serves several.

    Returns:
        `[..., out]` in the dtype of `x`. Gradients reach `x` and `bias`.

    Raises:
        ValueError: A shape or a dtype does not fit.
        RuntimeError: `scale` wants a gradient.

    Example:
        >>> import torch
        >>> codes = torch.tensor([0x21, 0x43], dtype=torch.uint8)  # the rows 1, 2 and 3, 4
        >>> scale, zero_point = torch.tensor([[1.0], [0.5]]), torch.tensor([[0], [1]], dtype=torch.uint8)
        >>> int_linear(torch.tensor([1.0, 10.0]), codes, scale, zero_point, bits=4)
        tensor([21., 16.])
    """
    return OPS.int_linear(x, codes, scale, zero_point, bias, bits, scale.shape[0] if out is None else out)
