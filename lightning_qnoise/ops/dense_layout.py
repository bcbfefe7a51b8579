"""How the float weight of a small convolution is laid out on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# Measured on one AVX-512 core of an AMD EPYC. What does not start a kernel of oneDNN's saves 30 to 40 us.
_LEAST_PACKED = 2**14  # elements of a weight that pays to be packed,
_LEAST_PACKED_FEW = 10**5  # and of one for few images, where channels-last is the alternative
_LEAST_REUSE = 2  # and its elements for each that is read or written
_FEW, _MOST_POSITIONS, _LEAST_CHANNELS = 2, 64, 16  # images, of so many positions, that prefer a channels-last weight
_MOST_PIXELWISE = 2**14  # elements of a weight that is multiplied by every pixel
_LARGEST_PATCH, _MOST_UNFOLDED = 64, 2**16  # numbers under a kernel, and in all patches and outputs, that are unfolded

Layout = Literal["packed", "pixelwise", "unfolded", "channels-last", "contiguous"]


def dense_layout(
    sizes: torch.Size,
    shape: torch.Size,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Layout:
    """Return the layout of a weight with which float32 images are convolved the fastest.

    `"packed"` is for `dense_conv2d`, `"channels-last"` and `"unfolded"` for `unfolded_conv2d`, `"pixelwise"` for
    `pixelwise_conv2d`, and `"contiguous"` for `F.conv2d`.

    Args:
        sizes: Of the images, `(n, channels, height, width)`.
        shape: Of the weight, `(out, channels, height, width)`.
        stride: Down and across.
        padding: Down and across.
        dilation: Down and across.

    Example:
        >>> [dense_layout(torch.Size([n, c, 4, 4]), torch.Size([c, c, 3, 3])) for n, c in [(1, 64), (4, 256)]]
        ['channels-last', 'packed']
    """
    n, channels, step, patch = sizes[0], sizes[1], stride[0] * stride[1], shape[1:].numel()
    reach = [(k - 1) * d for k, d in zip(shape[2:], dilation, strict=True)]
    places = [(s + 2 * p - r - 1) // t + 1 for s, p, r, t in zip(sizes[2:], padding, reach, stride, strict=True)]
    positions = n * places[0] * places[1]
    if min(places) < 1 or channels != shape[1]:  # an error of torch's
        return "contiguous"
    least = max(_LEAST_PACKED if n > _FEW else _LEAST_PACKED_FEW, _LEAST_REUSE * (sizes.numel() + positions * shape[0]))
    if patch > channels and shape.numel() >= least and torch.backends.mkldnn.is_available():
        return "packed"
    is_pixel = patch == channels and not any(padding)
    if n > 1 and step > 1 and is_pixel and shape.numel() <= _MOST_PIXELWISE:
        return "pixelwise"
    if any(d > 1 for d in dilation):
        return "contiguous"
    if n > 1 and patch <= _LARGEST_PATCH and positions * (patch + shape[0]) * step <= _MOST_UNFOLDED:
        return "unfolded"
    is_few = n <= _FEW and positions <= n * _MOST_POSITIONS and channels >= _LEAST_CHANNELS
    return "channels-last" if is_few else "contiguous"


def output_layout(x: Tensor) -> torch.memory_format:
    """Return the layout of what a convolution makes of an image: channels last where these are last.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> output_layout(x), output_layout(x.contiguous(memory_format=torch.channels_last))
        (torch.contiguous_format, torch.channels_last)
    """
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
