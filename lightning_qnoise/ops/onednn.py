"""oneDNN's products of bytes, as torch's compiler uses them on CPUs: the exact sums, rounded to float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of the output: scale, zero point, dtype, and what follows.
_OPTIONS: tuple[Any, ...] = 1.0, 0, torch.float32, "none", [], ""


class Packed(NamedTuple):
    """A weight in oneDNN's own layout, one byte an element.

    Attributes:
        weight: int8, opaque.
        scale: float32 `[out]`, all one.
        zero_point: int32 `[out]`, all zero; oneDNN does not read it.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor


class Geometry(NamedTuple):
    """Of a convolution, each down and across; what it pads with is code 0."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def pack_linear(codes: Tensor) -> Packed:
    """Lay out an int8 matrix `[out, in]`."""
    return Packed(torch.ops.onednn.qlinear_prepack(codes, None), *_neutral(codes))


def linear(x: Tensor, matrix: Packed, factor: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W.T * factor + bias`, float32 `[rows, out]`, for `x` int8 `[rows, in]`, which is overwritten."""
    bytes_, (weight, scale, zero_point) = x.view(torch.uint8).bitwise_xor_(128), matrix
    scale = scale if factor is None else factor
    return torch.ops.onednn.qlinear_pointwise.default(bytes_, 1.0, 128, weight, scale, zero_point, bias, *_OPTIONS)


def pack_conv2d(codes: Tensor, sizes: Sequence[int], geometry: Geometry) -> Packed:
    """Lay out int8 kernels `[out, channels, height, width]`, for these sizes of images and this geometry only.

    For others every call would reorder them, which takes many times as long as the convolution.
    """
    scale, zero_point = _neutral(codes)
    weight = torch.ops.onednn.qconv_prepack(codes, scale, 1.0, 0, *_lists(geometry), list(sizes))
    return Packed(weight, scale, zero_point)


def conv2d(
    images: Tensor, kernels: Packed, geometry: Geometry, factor: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Convolve images, uint8 `[n, channels, height, width]`, channels last; float32, channels last, as in `linear`."""
    weight, scale, zero_point = kernels
    scale = scale if factor is None else factor
    return _qconv()(images, 1.0, 0, weight, scale, zero_point, bias, *_lists(geometry), *_OPTIONS)


def is_exact() -> bool:
    """Whether these kernels are there, and do not saturate in 16 bits, as without VNNI instructions."""
    codes = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    images = torch.full((32, 64, 1, 1), 255, dtype=torch.uint8, device="cpu")
    try:
        product = linear(codes.clone(), pack_linear(codes))
        geometry = Geometry((1, 1), (0, 0), (1, 1))
        kernels = pack_conv2d(codes[:, :, None, None], images.shape, geometry)
        convolved = conv2d(images.contiguous(memory_format=torch.channels_last), kernels, geometry)
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return False
    return bool((product == 64 * 127**2).all() and (convolved == 64 * 127 * 255).all())


def _neutral(codes: Tensor) -> tuple[Tensor, Tensor]:
    """A scale and a zero point that change nothing."""
    ones = torch.ones(len(codes), dtype=torch.float32, device=codes.device)
    return ones, torch.zeros_like(ones, dtype=torch.int32)


def _lists(geometry: Geometry) -> tuple[Any, ...]:
    """As the operators take it, with the number of groups."""
    return list(geometry.stride), list(geometry.padding), list(geometry.dilation), 1


@lru_cache
def _qconv() -> Any:
    """The operator under its name since torch 2.7, or the one before."""
    operators = torch.ops.onednn
    return (operators.qconv_pointwise if hasattr(operators, "qconv_pointwise") else operators.qconv2d_pointwise).default
