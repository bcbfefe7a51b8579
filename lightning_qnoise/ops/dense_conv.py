"""Convolutions of few positions in floats on a CPU, whose time goes into reordering the weight: it is kept in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Measured on one AVX-512 core of an AMD EPYC, with 3x3 kernels.
_LEAST_PACKED = 2**15  # elements of a weight that pays to be packed: oneDNN's operator takes 20 us to start,
_LEAST_PACKED_ALONE = 10**5  # and of one for a single image, where channels-last is the alternative
_LEAST_REUSE = 4  # and its elements for each that is read or written
_MOST_POSITIONS, _LEAST_CHANNELS = 64, 16  # of a single image that prefers a channels-last weight


class DenseKernel(NamedTuple):
    """A float weight in oneDNN's own layout, for images of one size.

    Attributes:
        weight: float32, opaque.
        sizes: Of the images, `(n, channels, height, width)`.
    """

    weight: Tensor
    sizes: torch.Size


def dense_layout(
    sizes: torch.Size, shape: torch.Size, stride: Sequence[int]
) -> Literal["packed", "channels-last", "contiguous"]:
    """Return the layout of a weight with which float32 images are convolved the fastest.

    A packed weight takes 0.3 to 0.9 of the time, a channels-last one 0.3 to 0.9.

    Args:
        sizes: Of the images, `(n, channels, height, width)`.
        shape: Of the weight, `(out, channels, height, width)`.
        stride: Down and across.

    Example:
        >>> [dense_layout(torch.Size([n, c, 4, 4]), torch.Size([c, c, 3, 3]), (1, 1)) for n, c in [(1, 64), (4, 256)]]
        ['channels-last', 'packed']
    """
    n, channels, height, width = sizes
    positions = n * height * width // (stride[0] * stride[1])
    passes = sizes.numel() + positions * shape[0]
    least = _LEAST_PACKED_ALONE if n == 1 else _LEAST_PACKED
    if shape[2:].numel() > 1 and shape.numel() >= max(least, _LEAST_REUSE * passes):
        return "packed"
    is_few = n == 1 and positions <= _MOST_POSITIONS and channels >= _LEAST_CHANNELS
    return "channels-last" if is_few else "contiguous"


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
    return y.contiguous() if x.is_contiguous() else y  # it comes with the channels last
