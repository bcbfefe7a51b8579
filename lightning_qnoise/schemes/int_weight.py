"""`IntWeight`: codes, scales and zero points of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qnoise.ops import int_linear
from lightning_qnoise.schemes.bits import pack_bits, unpack_bits
from lightning_qnoise.schemes.int8_products import Int8Products
from lightning_qnoise.schemes.ranges import affine_decode, affine_round, round_trip

if TYPE_CHECKING:
    from lightning_qnoise.schemes.integer import Int


class IntWeight(Int8Products):
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
        super().__init__(scheme, shape, dtype, codes.device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def zeros(self) -> Tensor:
        """The zero points, float32 `[rows, groups]`."""
        if self.zero_point is None:
            return torch.full_like(self.scale, 2 ** (self.scheme.bits - 1))
        return self.zero_point.float()

    @property
    def is_fixed(self) -> bool:
        """Only a min-max range follows the weight."""
        return self.scheme.range != "minmax"

    def decode(self) -> Tensor:
        """Return `(codes - zero_point) * scale`."""
        bits = self.scheme.bits
        values = (self.codes if bits == 8 else unpack_bits(self.codes, bits, self.shape.numel())).float()
        scale, zero_point = self._grid()
        grouped = values.view(*self.scale.shape, -1).sub_(zero_point).mul_(scale)  # in the memory of the result
        return grouped.view(self.shape).to(self.dtype)

    def linear_in_floats(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Decode a slice of the weight at a time, or use the kept one."""
        if self.memory == "fast" and not torch.is_grad_enabled():
            return super().linear_in_floats(x, bias)
        matrix = self.codes, self.scale, self.zero_point
        return int_linear(self.quantize_input(x), *matrix, bias, self.scheme.bits, self.shape[0])

    @property
    def is_int8(self) -> bool:
        """With one scale a row."""
        return self.scale.shape[1] == 1

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Return the codes."""
        codes = unpack_bits(self.codes, self.scheme.bits, self.shape.numel()).view(self.shape)
        return codes, self.scale, self.zero_point, self.scheme.bits

    def project(self, weight: Tensor) -> Tensor:
        """Quantize on the own grid, or on that of the weight's min-max range of the moment."""
        if not self.is_fixed:
            return self.scheme.fake_quantize(weight)
        return round_trip(self._grouped(weight), *self._grid(), self.scheme.bits).view(weight.shape).to(weight.dtype)

    def clamp(self, weight: Tensor) -> Tensor:
        """Cut the weight to the range of a fixed grid."""
        if not self.is_fixed:
            return weight
        ends = (affine_decode(code, *self._grid()).to(weight.dtype) for code in (0, 2**self.scheme.bits - 1))
        return weight.reshape(*self.scale.shape, -1).clamp(*ends).view(weight.shape)

    def noise_arguments(self, weight: Tensor) -> dict[str, Any]:
        """Return the grid that `project` uses, and whether the weight is cut to its range."""
        scale, zero_point = (self.scale, self.zero_point) if self.is_fixed else self.scheme.fit(weight)
        return {"scale": scale, "zero_point": zero_point, "bits": self.scheme.bits, "clamp": self.is_fixed}

    def take(self, weight: Tensor) -> IntWeight:
        """Encode on the grid that `project` uses."""
        if not self.is_fixed:
            return self.scheme.encode(weight)
        self.forget()
        codes = affine_round(self._grouped(weight), *self._grid(), self.scheme.bits)
        self.codes.copy_(pack_bits(codes.int(), self.scheme.bits))
        return self

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 `[rows, groups, 1]`."""
        return self.scale[..., None], self.zeros[..., None]

    def _grouped(self, weight: Tensor) -> Tensor:
        """Float32 `[rows, groups, size]`."""
        return weight.detach().reshape(*self.scale.shape, -1).float()
