"""The weight of convolutions in integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qnoise.ops import onednn
from lightning_qnoise.ops.int8_weight import signed_codes


class Int8Kernel(NamedTuple):
    """Kernels, ready for `int8_conv2d`.

    Attributes:
        matrix: The codes less `2**(bits - 1)`, packed.
        geometry: Of the convolution; without a padding that the images bring along.
        scale: float32 `[out]`.
        sums: float32 `[out]`: `(code - zero_point) * scale` summed over a kernel.
        zeros: float32 `[out, 1, 1]`: `scale` times the zero points less `2**(bits - 1)`; None if these are zero.
        window: Height and width of a kernel.
        sizes: Of the images that it is packed for, `(n, channels, height, width)`.
        border: Zeros that the images bring along, left, right, above and below.
        factor: float32, `scale` times that of the images, where all have one that is known.
    """

    matrix: onednn.Packed
    geometry: onednn.Geometry
    scale: Tensor
    sums: Tensor
    zeros: Tensor | None
    window: Sequence[int]
    sizes: torch.Size
    border: Sequence[int]
    factor: Tensor | None = None


def prepare_int8_conv2d(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    sizes: torch.Size,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    is_unsigned: bool = False,
    image_scale: Tensor | None = None,
) -> Int8Kernel:
    """Lay out quantized kernels, `(codes - zero_point) * scale`, for `int8_conv2d`.

    Args:
        codes: Integers `[out, channels, height, width]` in `[0, 2**bits)`, of any integer dtype.
        scale: Float32, one per kernel or one in all.
        zero_point: Integers, one per kernel or one in all; None stands for `2**(bits - 1)`, which is the fastest.
        bits: Bits per code, at most 8.
        sizes: Of the images, `(n, channels, height, width)`.
        stride: Down and across.
        padding: Zeros around the images, left, right, above and below, as `F.pad` counts them.
        dilation: Down and across.
        is_unsigned: Whether the zero point of the images is 0 at all times. That spares a copy of what is padded.
        image_scale: float32 `[]`, of all images at all times, if they have one.

    Raises:
        ValueError: A kernel is too large for sums in 32 bits, has several scales, or does not fit the images.

    Example:
        >>> sizes = torch.Size([1, 1, 2, 2])
        >>> kernel = prepare_int8_conv2d(torch.full((1, 1, 2, 2), 129), torch.ones(1), None, 8, sizes)
        >>> kernel.sums
        tensor([4.])
    """
    left, right, above, below = padding
    padded = torch.Size([*sizes[:2], sizes[2] + above + below, sizes[3] + left + right])
    _check(codes.shape, padded, dilation)
    signed, scale, zero_point = signed_codes(codes, scale, zero_point, bits)
    sums, zeros = signed.sum(dim=(1, 2, 3), dtype=torch.int32).float(), None
    if zero_point is not None:
        sums, zeros = sums - codes[0].numel() * zero_point, (scale * zero_point)[:, None, None]
    border, packed_for, geometry = padding, padded, onednn.Geometry(stride, (0, 0), dilation)
    if is_unsigned and left == right and above == below:
        border, packed_for, geometry = (0, 0, 0, 0), sizes, geometry._replace(padding=(above, left))
    matrix = onednn.pack_conv2d(signed, packed_for, geometry)
    factor = None if image_scale is None else scale * image_scale
    return Int8Kernel(matrix, geometry, scale, sums * scale, zeros, codes.shape[2:], sizes, border, factor)


def _check(shape: torch.Size, padded: torch.Size, dilation: Sequence[int]) -> None:
    reach = [d * (k - 1) + 1 for k, d in zip(shape[2:], dilation, strict=True)]
    if padded[1] != shape[1]:
        raise ValueError(f"kernels of {shape[1]} channels cannot read images of {padded[1]}")
    if any(size < r for size, r in zip(padded[2:], reach, strict=True)):
        raise ValueError(f"the kernel reaches over {reach}, more than the padded input {list(padded[2:])}")
