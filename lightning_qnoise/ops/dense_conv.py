"""Convolutions of few positions in floats on a CPU, whose time goes into reordering the weight: it is kept in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qnoise.ops.dense_layout import output_layout


class DenseKernel(NamedTuple):
    """A float weight in oneDNN's own layout, for images of one size.

    Attributes:
        weight: float32, opaque.
        sizes: Of the images, `(n, channels, height, width)`.
    """

    weight: Tensor
    sizes: torch.Size


def prepare_dense_conv2d(
    weight: Tensor, sizes: torch.Size, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> DenseKernel:
    """Pack a float32 weight `[out, channels, height, width]` for images of these sizes."""
    geometry = list(padding), list(stride), list(dilation), 1
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(sizes))
    return DenseKernel(packed, sizes)


def dense_conv2d(
    x: Tensor,
    kernel: DenseKernel,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return what `F.conv2d` does for images of the kernel's sizes, without a gradient.

    Raises:
        ValueError: The kernel is packed for other sizes, which would take longer than it saves.

    Example:
        >>> x, geometry = torch.randn(1, 8, 4, 4), ((1, 1), (1, 1), (1, 1))
        >>> kernel = prepare_dense_conv2d(torch.randn(16, 8, 3, 3), x.shape, *geometry)
        >>> dense_conv2d(x, kernel, None, *geometry).shape
        torch.Size([1, 16, 4, 4])
    """
    if x.shape != kernel.sizes:
        raise ValueError(f"the kernel is packed for images {list(kernel.sizes)}, got {list(x.shape)}")
    geometry = list(padding), list(stride), list(dilation), 1
    y = torch.ops.mkldnn._convolution_pointwise(x, kernel.weight, bias, *geometry, "none", [], "")
    return y.contiguous(memory_format=output_layout(x))  # it comes with the channels last
