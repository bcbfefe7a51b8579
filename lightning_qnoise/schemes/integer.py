"""Affine integers of 2 to 8 bits: `w = (code - zero_point) * scale`, with one scale per tensor, channel or group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qnoise.schemes.base import Scheme, matrix_shape
from lightning_qnoise.schemes.bits import pack_bits, packed_length, unpack_bits
from lightning_qnoise.schemes.packed import PackedWeight


def affine_range(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the min-max range of the last dimension, widened to hold zero.

    Args:
        weight: Float32 `[..., n]`.
        bits: Bits per code.
        symmetric: Use the range `[-max|w|, max|w|]` and the fixed zero point `2**(bits - 1)`.

    Returns:
        Scale, float32 `[...]`, positive, and zero point, float32 `[...]`, whole numbers in `[0, 2**bits)`.
    """
    high, low = weight.amax(dim=-1).clamp(min=0).double(), weight.amin(dim=-1).clamp(max=0).double()
    levels = 2**bits - 1
    span = 2 * torch.maximum(high, -low) * levels / (levels - 1) if symmetric else high - low
    scale = (span / levels).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, (-low.float() / scale).round().clamp(0, levels)


def affine_round(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the codes of `weight`, float32 whole numbers; what lies outside the range takes the end value.

    Example:
        >>> affine_round(torch.tensor([-9.0, 0.0, 1.0, 9.0]), torch.tensor(0.5), torch.tensor(8.0), bits=4)
        tensor([ 0.,  8., 10., 15.])
    """
    return (weight / scale + zero_point).round().clamp(0, 2**bits - 1)


@dataclass(frozen=True)
class Int(Scheme):
    """Integer weights with a min-max range (Jacob et al. 2018; Quant-Noise eq. 2 with the sign of z set right).

    Zero is always representable, so padding rows and pruned weights stay zero.

    Args:
        bits: Bits per weight, 2 to 8.
        granularity: What shares a scale: `"tensor"`, `"channel"` (a row of the weight) or `"group:N"` (N consecutive
            elements of a row; N must divide the row).
        symmetric: Fix the zero point in the middle; saves one byte a scale.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> packed = Int(bits=4).encode(torch.linspace(-1, 1, 32).view(2, 16))
        >>> packed.codes.shape, packed.scale.shape
        (torch.Size([16]), torch.Size([2, 1]))
    """

    bits: int = 8
    granularity: str = "channel"
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Int expects bits from 2 to 8, got {self.bits}")
        if not re.fullmatch(r"tensor|channel|group:[1-9]\d*", self.granularity):
            raise ValueError(f"Int expects granularity 'tensor', 'channel' or 'group:N', got {self.granularity!r}")

    def __str__(self) -> str:
        return f"Int(bits={self.bits}, granularity={self.granularity!r})"

    def noise_blocks(self, shape: Sequence[int]) -> tuple[int, int]:
        """Every element is distorted on its own."""
        self._grid(shape)
        return 1, 1

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> IntWeight:
        """Return the packed weight's shapes and dtypes without data."""
        rows, groups, size = self._grid(shape)
        codes = torch.empty(packed_length(rows * groups * size, self.bits), dtype=torch.uint8, device=device)
        scale = torch.empty(rows, groups, dtype=torch.float32, device=device)
        zero_point = None if self.symmetric else torch.empty(rows, groups, dtype=torch.uint8, device=device)
        return IntWeight(self, shape, dtype, codes, scale, zero_point)

    def encode(self, weight: Tensor, start: PackedWeight | None = None) -> IntWeight:
        """Round to the nearest level of the weight's own range."""
        codes, scale, zero_point = self._quantize(weight)
        if not torch.isfinite(_dequantize(codes, scale, zero_point).to(weight.dtype)).all():
            raise ValueError(f"weights from {weight.min():.3g} to {weight.max():.3g} overflow {weight.dtype} as {self}")
        stored = None if self.symmetric else zero_point.to(torch.uint8)
        return IntWeight(self, weight.shape, weight.dtype, pack_bits(codes.int(), self.bits), scale, stored)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Return `encode(weight).decode()` without packing."""
        return _dequantize(*self._quantize(weight)).view(weight.shape).to(weight.dtype)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes float32 `[rows, groups, size]`, scale and zero point float32 `[rows, groups]`."""
        grouped = weight.detach().reshape(self._grid(weight.shape)).float()
        scale, zero_point = affine_range(grouped, self.bits, self.symmetric)
        return affine_round(grouped, scale[..., None], zero_point[..., None], self.bits), scale, zero_point

    def _grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        rows, cols = matrix_shape(shape)
        if self.granularity == "tensor":
            return 1, 1, rows * cols
        if self.granularity == "channel":
            return rows, 1, cols
        size = int(self.granularity.removeprefix("group:"))
        if cols % size:
            raise ValueError(
                f"Int(granularity={self.granularity!r}) cannot cut rows of {cols} elements (shape {list(shape)}) into "
                f"groups; pick a divisor of {cols}, or granularity='channel'"
            )
        return rows, cols // size, size


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values float32 `[rows, groups, size]` of codes of that shape, scale and zero point `[rows, groups]`."""
    return (codes - zero_point[..., None]) * scale[..., None]


class IntWeight(PackedWeight):
    """Codes, scales and zero points of one weight.

    Attributes:
        codes: uint8 `[ceil(numel * bits / 8)]`, row-major.
        scale: float32 `[rows, groups]` (`[1, 1]` per tensor).
        zero_point: uint8 `[rows, groups]`, or None for a symmetric range.
    """

    scheme: Int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        scheme: Int,
        shape: Sequence[int],
        dtype: torch.dtype,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
    ) -> None:
        super().__init__(scheme, shape, dtype)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def decode(self) -> Tensor:
        """Return `(codes - zero_point) * scale`."""
        bits = self.scheme.bits
        codes = unpack_bits(self.codes, bits, self.shape.numel()).view(*self.scale.shape, -1)
        zero_point = torch.full_like(self.scale, 2 ** (bits - 1)) if self.zero_point is None else self.zero_point
        return _dequantize(codes, self.scale, zero_point).view(self.shape).to(self.dtype)

    def project(self, weight: Tensor) -> Tensor:
        """Quantize with the weight's range of the moment, which no element can leave."""
        return self.scheme.fake_quantize(weight)
