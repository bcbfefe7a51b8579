"""Convolutions in integers on a CPU: the windows of the input's codes as a matrix, a slice of it at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_qnoise.ops.int8 import int8_product, shifted_codes
from lightning_qnoise.ops.int8_grid import Int8Grid
from lightning_qnoise.ops.int8_weight import Int8Weight

_SLICE = 2**19  # bytes of a slice of the windows, so that it stays in the cache


def int8_conv2d(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    grid: Int8Grid,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Quantize `x`, convolve it with the weight in integers and return the result in the dtype of `x`.

    Args:
        x: Float `[n, channels, height, width]`.
        weight: From `prepare_int8`, of the codes `[out, kernel height * kernel width * channels]` of `int8_kernel`.
        bias: Float `[out]` or None.
        grid: From `prepare_grid`, for this weight; one scale, or one per sample.
        kernel_size: Height and width.
        stride: Down and across.
        padding: Zeros added left, right, above and below, as `F.pad` counts them.
        dilation: Down and across.

    Returns:
        `[n, out, height, width]` as `F.conv2d`, without a gradient, in channels-last memory where `x` is.

    Raises:
        ValueError: The input is smaller than the kernel, or has other channels.

    Example:
        >>> from lightning_qnoise.ops import prepare_grid, prepare_int8
        >>> kernel = prepare_int8(int8_kernel(torch.full((1, 1, 2, 2), 129)), torch.tensor([1.0]), None)
        >>> grid = prepare_grid(kernel, torch.tensor(1.0), torch.tensor(0.0))
        >>> int8_conv2d(torch.arange(4.0).view(1, 1, 2, 2), kernel, None, grid, (2, 2))
        tensor([[[[6.]]]])
    """
    windows = _windows(_padded_codes(x.detach(), grid, padding), kernel_size, stride, dilation)
    if grid.scale.ndim:
        factor, sums = (grid.scale * weight.scale)[:, None, None], (grid.offset * weight.sums)[:, None, None]
        grid = grid._replace(factor=factor, shift=sums.mul_(factor).neg_())
    n_in = windows.shape[3:].numel()
    if n_in != len(weight.matrix):
        raise ValueError(f"a kernel of {len(weight.matrix)} inputs cannot read windows of {n_in}, got {list(x.shape)}")
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    n, height, width = windows.shape[:3]
    y = x.new_empty((n, height, width, len(weight.scale)) if is_last else (n, len(weight.scale), height, width))
    bias = None if bias is None else bias.detach().float()
    _convolve(windows, weight, bias, grid, y if is_last else y.permute(0, 2, 3, 1))
    return y.permute(0, 3, 1, 2) if is_last else y


def int8_kernel(codes: Tensor) -> Tensor:
    """Return the codes of a kernel `[out, channels, height, width]` as `int8_conv2d` reads them, `[out, in]`.

    Example:
        >>> int8_kernel(torch.arange(8).view(1, 2, 2, 2))
        tensor([[0, 4, 1, 5, 2, 6, 3, 7]])
    """
    return codes.permute(0, 2, 3, 1).flatten(1)


def _convolve(windows: Tensor, weight: Int8Weight, bias: Tensor | None, grid: Int8Grid, y: Tensor) -> None:
    """Write to `y` `[n, height, width, out]`; the windows become a matrix, some samples or rows of one at a time."""
    n, height, width = windows.shape[:3]
    if windows.numel() <= _SLICE or n == height == 1:
        codes = windows.reshape(n * height * width, windows.shape[3:].numel())
        int8_product(codes, weight, bias, grid, out=y)
        return
    dim, size = (0, n) if n > 1 else (1, height)
    step = max(1, size * _SLICE // windows.numel())
    for start, part, out in zip(range(0, size, step), windows.split(step, dim), y.split(step, dim), strict=True):
        _convolve(part, weight, bias, grid if dim else grid.rows(slice(start, start + step)), out)


def _padded_codes(x: Tensor, grid: Int8Grid, padding: Sequence[int]) -> Tensor:
    """The int8 codes of the padded images, `[n, height, width, channels]`, contiguous."""
    if grid.scale.ndim:
        grid = grid._replace(scale=grid.scale[..., None, None], zero_point=grid.zero_point[..., None, None])
    codes = shifted_codes(x, grid).permute(0, 2, 3, 1)
    if not any(padding):
        return codes.to(torch.int8, memory_format=torch.contiguous_format)
    left, right, above, below = padding
    n, height, width, channels = codes.shape
    images = torch.empty(n, above + height + below, left + width + right, channels, dtype=torch.int8, device=x.device)
    if grid.offset.ndim:
        images.copy_(grid.offset.to(torch.int8)[..., None, None])
    else:
        images.fill_(int(grid.offset))
    images[:, above : above + height, left : left + width].copy_(codes)
    return images


def _windows(images: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A view `[n, height, width, kernel height, kernel width, channels]` of contiguous images."""
    n, channels = images.shape[0], images.shape[3]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    sizes = [(size - r) // s + 1 for size, r, s in zip(images.shape[1:3], reach, stride, strict=True)]
    if min(sizes) < 1:
        padded = list(images.shape[1:3])
        raise ValueError(f"the kernel reaches over {reach}, more than the padded input {padded}")
    batch, down, across, channel = images.stride()
    steps = (down * stride[0], across * stride[1], down * dilation[0], across * dilation[1])
    return images.as_strided((n, *sizes, *kernel_size, channels), (batch, *steps, channel))
