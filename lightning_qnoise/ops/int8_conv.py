"""Convolutions in integers on a CPU: `y = sx * sw * sum((qx - zx) * (qw - zw)) + bias` over every window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qnoise.ops import onednn
from lightning_qnoise.ops.affine import is_zero
from lightning_qnoise.ops.dense_layout import output_layout
from lightning_qnoise.ops.int8_codes import quantized_images
from lightning_qnoise.ops.int8_kernel import Int8Kernel


def int8_conv2d(
    x: Tensor, kernel: Int8Kernel, bias: Tensor | None, scale: Tensor, zero_point: Tensor | int, bits: int = 8
) -> Tensor:
    """Quantize `x`, convolve it in integers and return the result in the dtype of `x`.

    Args:
        x: Float `[n, channels, height, width]` of the sizes of the kernel, not empty; it counts as
            `affine_steps(x, scale, zero_point, bits) * scale`.
        kernel: From `prepare_int8_conv2d`.
        bias: Float `[out]` or None.
        scale: float32, `[]` for all of `x`, or one per sample, `[n, 1, 1, 1]`; the one that the kernel knows, if so.
        zero_point: Whole numbers in `[0, 2**bits)`: float32 of the shape of `scale`, or one number; 0 is the fastest.
        bits: Bits per code of `x`, at most 8.

    Returns:
        `[n, out, height, width]` as `F.conv2d`, without a gradient, in channels-last memory where `x` is.

    Raises:
        ValueError: The kernel is packed for other sizes, or for another zero point.

    Example:
        >>> from lightning_qnoise.ops import prepare_int8_conv2d
        >>> x = torch.arange(4.0).view(1, 1, 2, 2)
        >>> kernel = prepare_int8_conv2d(torch.full((1, 1, 2, 2), 129), torch.tensor([1.0]), None, 8, x.shape)
        >>> int8_conv2d(x, kernel, None, torch.tensor(1.0), 0)
        tensor([[[[6.]]]])
    """
    if x.shape != kernel.sizes:
        raise ValueError(f"the kernel is packed for images {list(kernel.sizes)}, got {list(x.shape)}")
    if any(kernel.geometry.padding) and not is_zero(zero_point):  # what oneDNN pads with is code 0
        raise ValueError(f"the kernel is packed for images with zero point 0, got {zero_point}")
    images = quantized_images(x.detach(), scale, zero_point, bits, kernel.border)
    shift = None if bias is None else bias.detach().float()
    if not is_zero(zero_point):
        distance = scale * -zero_point
        zero = kernel.sums * (distance.view(-1, 1) if scale.ndim else distance)
        shift = zero if shift is None else zero.add_(shift)
    return (_scale_each if scale.ndim else _scale_all)(x, images, kernel, scale, shift)


def _scale_all(x: Tensor, images: Tensor, kernel: Int8Kernel, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Convolve images of one scale; `shift` is `[out]`. oneDNN scales and shifts."""
    factor = kernel.scale * scale if kernel.factor is None else kernel.factor
    y = onednn.conv2d(images, kernel.matrix, kernel.geometry, factor, shift)
    if kernel.zeros is None:
        return y.to(x.dtype, memory_format=output_layout(x))
    return torch.addcmul(y, _window_sums(images, kernel).mul_(scale), kernel.zeros, value=-1, out=_blank(x, y))


def _scale_each(x: Tensor, images: Tensor, kernel: Int8Kernel, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Convolve images of a scale for each; `shift` is `[out]` or `[n, out]`."""
    y = onednn.conv2d(images, kernel.matrix, kernel.geometry, kernel.scale)
    if kernel.zeros is not None:
        y.addcmul_(_window_sums(images, kernel), kernel.zeros, value=-1)
    if shift is None:
        return torch.mul(y, scale, out=_blank(x, y))
    return torch.addcmul(shift[..., None, None], y, scale, out=_blank(x, y))


def _window_sums(images: Tensor, kernel: Int8Kernel) -> Tensor:
    """The codes that every window covers, summed: float32 `[n, 1, height, width]`.

    One more kernel of ones would do, but costs more, as oneDNN computes kernels in blocks of sixteen.
    """
    window, stride, padding, dilation = (tuple(sizes) for sizes in (kernel.window, *kernel.geometry))
    sums = images.sum(1, keepdim=True, dtype=torch.int32).float()
    if dilation == (1, 1) and all(2 * p <= size for p, size in zip(padding, window, strict=True)):
        return F.avg_pool2d(sums, window, stride, padding, divisor_override=1)
    return F.conv2d(sums, sums.new_ones(1, 1, *window), None, stride, padding, dilation)


def _blank(x: Tensor, like: Tensor) -> Tensor:
    """The output, empty, of the shape of `like`: the last pass over it writes dtype and layout, too."""
    return torch.empty_like(like, dtype=x.dtype, memory_format=output_layout(x))
