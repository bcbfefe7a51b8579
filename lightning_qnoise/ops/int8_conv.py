"""Convolutions in integers on a CPU: `y = sx * sw * sum((qx - zx) * (qw - zw)) + bias` over every window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qnoise.ops import onednn
from lightning_qnoise.ops.int8_codes import signed_input
from lightning_qnoise.ops.int8_weight import signed_codes


class Int8Kernel(NamedTuple):
    """Kernels, ready for `int8_conv2d`.

    Attributes:
        matrix: The codes less `2**(bits - 1)`, packed. With zero points one more kernel follows, which sums windows.
        scale: float32 `[out, 1, 1]`.
        sums: float32 `[out, 1, 1]`, whole numbers: `code - zero_point` summed over a kernel.
        zero_point: float32 `[out, 1, 1]`, whole numbers: zero points less `2**(bits - 1)`; None if all are zero.
        sizes: Of the images that it is packed for, `(n, channels, height, width)`.
        stride: Down and across.
        padding: Zeros around the images, left, right, above and below, as `F.pad` counts them.
        dilation: Down and across.
    """

    matrix: onednn.Packed
    scale: Tensor
    sums: Tensor
    zero_point: Tensor | None
    sizes: torch.Size
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def prepare_int8_conv2d(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    sizes: torch.Size,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
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

    Raises:
        ValueError: A kernel is too large for sums in 32 bits, has several scales, or does not fit the images.

    Example:
        >>> sizes = torch.Size([1, 1, 2, 2])
        >>> kernel = prepare_int8_conv2d(torch.full((1, 1, 2, 2), 129), torch.ones(1), None, 8, sizes)
        >>> kernel.sums.flatten()
        tensor([4.])
    """
    padded = [sizes[2] + padding[2] + padding[3], sizes[3] + padding[0] + padding[1]]
    reach = [d * (k - 1) + 1 for k, d in zip(codes.shape[2:], dilation, strict=True)]
    if sizes[1] != codes.shape[1]:
        raise ValueError(f"kernels of {codes.shape[1]} channels cannot read images {list(sizes)}")
    if any(size < r for size, r in zip(padded, reach, strict=True)):
        raise ValueError(f"the kernel reaches over {reach}, more than the padded input {padded}")
    signed, scale, zero_point = signed_codes(codes, scale, zero_point, bits)
    sums = signed.sum(dim=(1, 2, 3), dtype=torch.int32).float()
    if zero_point is not None:
        sums = sums - codes[0].numel() * zero_point
        zero_point = zero_point[:, None, None]
        signed = torch.cat([signed, torch.ones_like(signed[:1])])
    matrix = onednn.pack_conv2d(signed, (sizes[0], sizes[1], *padded), stride, dilation)
    return Int8Kernel(matrix, scale[:, None, None], sums[:, None, None], zero_point, sizes, stride, padding, dilation)


def int8_conv2d(
    x: Tensor, kernel: Int8Kernel, bias: Tensor | None, scale: Tensor, zero_point: Tensor | int, bits: int = 8
) -> Tensor:
    """Quantize `x`, convolve it in integers and return the result in the dtype of `x`.

    Args:
        x: Float `[n, channels, height, width]` of the sizes of the kernel, not empty; it counts as
            `affine_steps(x, scale, zero_point, bits) * scale`.
        kernel: From `prepare_int8_conv2d`.
        bias: Float `[out]` or None.
        scale: float32, `[]` for all of `x`, or one per sample, `[n, 1, 1, 1]`.
        zero_point: Whole numbers in `[0, 2**bits)`: float32 of the shape of `scale`, or one number.
        bits: Bits per code of `x`, at most 8.

    Returns:
        `[n, out, height, width]` as `F.conv2d`, without a gradient, in channels-last memory where `x` is.

    Raises:
        ValueError: The kernel is packed for other sizes.

    Example:
        >>> x = torch.arange(4.0).view(1, 1, 2, 2)
        >>> kernel = prepare_int8_conv2d(torch.full((1, 1, 2, 2), 129), torch.tensor([1.0]), None, 8, x.shape)
        >>> int8_conv2d(x, kernel, None, torch.tensor(1.0), 0)
        tensor([[[[6.]]]])
    """
    if x.shape != kernel.sizes:
        raise ValueError(f"the kernel is packed for images {list(kernel.sizes)}, got {list(x.shape)}")
    images = _padded(signed_input(x.detach(), scale, zero_point - 128, bits)[0], zero_point, kernel.padding)
    sums = onednn.conv2d(images, kernel.matrix, kernel.stride, kernel.dilation)
    if kernel.zero_point is not None:
        sums = torch.addcmul(sums[:, :-1], sums[:, -1:], kernel.zero_point, value=-1)
    factor = scale * kernel.scale
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if is_last else torch.contiguous_format
    y = torch.empty_like(sums, dtype=x.dtype, memory_format=layout)
    bias = None if bias is None else bias.detach().float()[:, None, None]
    if isinstance(zero_point, int) and not zero_point:
        return torch.mul(sums, factor, out=y) if bias is None else torch.addcmul(bias, sums, factor, out=y)
    shift = kernel.sums * factor * -zero_point
    return torch.addcmul(shift if bias is None else shift.add_(bias), sums, factor, out=y)


def _padded(codes: Tensor, zero_point: Tensor | int, padding: Sequence[int]) -> Tensor:
    """The codes, uint8, with the zero point around every image, channels last."""
    bytes_ = codes.view(torch.uint8)
    if not any(padding):
        return bytes_.bitwise_xor_(128).contiguous(memory_format=torch.channels_last)
    left, right, above, below = padding
    n, channels, height, width = codes.shape
    sizes = n, channels, above + height + below, left + width + right
    images = torch.empty(sizes, dtype=torch.uint8, device=codes.device, memory_format=torch.channels_last)
    images.copy_(zero_point) if isinstance(zero_point, Tensor) else images.fill_(zero_point)
    torch.bitwise_xor(bytes_, 128, out=images[:, :, above : above + height, left : left + width])
    return images
