"""`Int`: affine integers of 2 to 8 bits, `w = (code - zero_point) * scale`, one scale per tensor, channel or group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_qnoise.schemes.activation import check_activation
from lightning_qnoise.schemes.base import Scheme, matrix_shape
from lightning_qnoise.schemes.bits import pack_bits, packed_length
from lightning_qnoise.schemes.gptq import compensated_codes
from lightning_qnoise.schemes.int_weight import IntWeight
from lightning_qnoise.schemes.packed import PackedWeight
from lightning_qnoise.schemes.ranges import (
    Range,
    affine_decode,
    affine_grid,
    affine_round,
    check_range,
    find_range,
    round_trip,
)


@dataclass(frozen=True)
class Int(Scheme):
    """Affine integers (Jacob et al. 2018; Quant-Noise eq. 2 with the sign of z set right) for a weight or an input.

    Zero is always representable, so padding rows and pruned weights stay zero.

    Args:
        bits: Bits per weight, 2 to 8.
        granularity: What shares a scale: `"tensor"`, `"channel"` (a row of the weight) or `"group:N"` (N consecutive
            elements of a row; N must divide the row).
        symmetric: Fix the zero point in the middle; saves one byte a scale.
        range: What the integers cover, see `find_range`; `"lsq"` is learned in finetuning stages. Other ranges than
            `"minmax"` stay as they were fitted while the weight moves, until the next refresh of the noise; what leaves
            them is clamped and gets no gradient.
        activation: The scheme of what enters the layer (Linear, convolution, attention; an Embedding has ids), or None.
        rounding: `"nearest"`, or `"gptq"` with a compensation of each column's error that needs data (Frantar et
            al. 2023); for packing in one shot.
        mode: Of an activation: `"dynamic"` finds the range in every input, `"static"` keeps the one of calibration.
        per: Of a dynamic activation: whether a `"token"` (a vector of a linear layer, a sample of a convolution; the
            default) or the whole `"tensor"` has a range. A static one has one range.

    Raises:
        ValueError: A value is out of range, or options contradict each other.

    Example:
        >>> packed = Int(bits=4).encode(torch.linspace(-1, 1, 32).view(2, 16))
        >>> packed.codes.shape, packed.scale.shape
        (torch.Size([16]), torch.Size([2, 1]))
    """

    bits: int = 8
    granularity: str = "channel"
    symmetric: bool = False
    range: Range = "minmax"
    activation: Int | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    mode: Literal["dynamic", "static"] = "dynamic"
    per: Literal["token", "tensor"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.activation, Mapping):  # from JSON
            object.__setattr__(self, "activation", Int(**self.activation))
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Int expects bits from 2 to 8, got {self.bits}")
        if not re.fullmatch(r"tensor|channel|group:[1-9]\d*", self.granularity):
            raise ValueError(f"Int expects granularity 'tensor', 'channel' or 'group:N', got {self.granularity!r}")
        check_range(self.range)
        for name, value, known in (
            ("rounding", self.rounding, ("nearest", "gptq")),
            ("mode", self.mode, ("dynamic", "static")),
            ("per", self.per, (None, "token", "tensor")),
        ):
            if value not in known:
                raise ValueError(f"Int expects {name} {' or '.join(map(repr, known))}, got {value!r}")
        if not isinstance(self.activation, Int | None):
            raise ValueError(f"Int expects activation to be an Int or None, got {self.activation!r}")
        check_activation("Int", self.activation)

    def __str__(self) -> str:
        activation = f", activation=Int(bits={self.activation.bits})" if self.activation else ""
        return f"Int(bits={self.bits}, granularity={self.granularity!r}{activation})"

    @property
    def per_token(self) -> bool:
        """Whether every token of an activation has a range of its own."""
        return self.per == "token" or (self.per is None and self.mode == "dynamic")

    @property
    def needs_inputs(self) -> bool:
        """Whether `encode` wants the second moment of the layer's inputs."""
        return self.rounding == "gptq"

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

    def encode(self, weight: Tensor, start: PackedWeight | None = None, moment: Tensor | None = None) -> IntWeight:
        """Fit the range and round; with `rounding="gptq"` and a moment, so that the layer's output changes least."""
        grouped = self._grouped(weight)
        scale, zero_point = self._fit(grouped)
        if moment is None or self.rounding == "nearest":
            codes = affine_round(grouped, scale[..., None], zero_point[..., None], self.bits)
        else:
            scales, zeros = (
                part[..., None].expand_as(grouped).reshape(len(weight), -1) for part in (scale, zero_point)
            )
            codes = compensated_codes(weight.detach().flatten(1).float(), scales, zeros, self.bits, moment)
            codes = codes.view_as(grouped)
        if not torch.isfinite(affine_decode(codes, scale[..., None], zero_point[..., None]).to(weight.dtype)).all():
            raise ValueError(f"weights from {weight.min():.3g} to {weight.max():.3g} overflow {weight.dtype} as {self}")
        stored = None if self.symmetric else zero_point.to(torch.uint8)
        return IntWeight(self, weight.shape, weight.dtype, pack_bits(codes.int(), self.bits), scale, stored)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Return `encode(weight).decode()` without packing, with every code to the nearest level."""
        grouped = self._grouped(weight)
        scale, zero_point = (part[..., None] for part in self._fit(grouped))
        return round_trip(grouped, scale, zero_point, self.bits).view(weight.shape).to(weight.dtype)

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the weight's range of the moment, float32 `[rows, groups]`."""
        return self._fit(self._grouped(weight))

    def _grouped(self, weight: Tensor) -> Tensor:
        """Float32 `[rows, groups, size]`."""
        return weight.detach().reshape(self._grid(weight.shape)).float()

    def _fit(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point float32 `[rows, groups]`."""
        ends = find_range(grouped, self.bits, self.symmetric, self.range)
        return affine_grid(*ends, self.bits, self.symmetric)

    def _grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        if self.mode != "dynamic" or self.per or self.range == "ema":
            raise ValueError(f"mode, per and range='ema' are of activations: Int(activation=Int({self.bits}, ...))")
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
