"""Small convolutions in floats on a CPU as products of matrices, which start sooner than oneDNN's kernels do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qnoise.ops.dense_layout import output_layout

_LEAST_PIXELS = 16  # of an image that is multiplied as it is


def unfolded_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Return what `F.conv2d` does, as a product of the weight and the patches of every image, without a gradient.

    It takes weights with the channels last, too.

    Example:
        >>> x, weight = torch.randn(2, 1, 8, 8), torch.randn(16, 1, 3, 3)
        >>> with torch.no_grad():
        ...     y = unfolded_conv2d(x, weight, None, (1, 1), (1, 1))
        >>> torch.allclose(y, F.conv2d(x, weight, padding=1), atol=1e-5)
        True
    """
    if len(x) == 1 or torch._C._len_torch_dispatch_stack():  # does the same for one; and FlopCounterMode knows it
        y = F.conv2d(x, weight, bias, stride, padding)
    else:
        y = torch.ops.aten.thnn_conv2d.default(x, weight, weight.shape[2:], bias, stride, padding)
    return y.contiguous(memory_format=output_layout(x))  # it comes with the channels last where the weight does


def pixelwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]) -> Tensor:
    """Return what `F.conv2d` does with kernels of one pixel, `[out, channels, 1, 1]`, as a product of matrices.

    Example:
        >>> x, weight = torch.randn(4, 8, 6, 6), torch.randn(16, 8, 1, 1)
        >>> y = pixelwise_conv2d(x, weight, None, (2, 2))
        >>> torch.allclose(y, F.conv2d(x, weight, stride=2), atol=1e-5)
        True
    """
    layout, x = output_layout(x), x[:, :, :: stride[0], :: stride[1]]
    n, channels, height, width = x.shape
    matrix = weight.view(len(weight), channels)
    if layout is torch.channels_last or height * width < _LEAST_PIXELS:
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        y = F.linear(rows, matrix, bias).view(n, height, width, -1).permute(0, 3, 1, 2)
        return y.contiguous(memory_format=layout)
    columns, matrices = x.reshape(n, channels, -1), matrix.expand(n, -1, -1)
    y = torch.bmm(matrices, columns) if bias is None else torch.baddbmm(bias[:, None], matrices, columns)
    return y.view(n, -1, height, width)
