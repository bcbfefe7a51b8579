"""A matrix of packed integers, and how it is decoded: a slice of rows at a time, in the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BUFFER = 2**19  # elements of a slice, 2 MiB: it stays in the cache, and malloc keeps its pages
_BUFFER_GPU = 2**23
_TILE = 16  # slices are a multiple of it: matrix products like that, and their codes then end on whole bytes


class IntMatrix(NamedTuple):
    """A matrix `(codes - zero_point) * scale`.

    Attributes:
        codes: uint8 `[ceil(n_out * n_in * bits / 8)]`, row-major, the first code in the lowest bits.
        scale: float32 `[1, 1]` or `[n_out, groups]`; a group is `n_in / groups` consecutive inputs.
        zero_point: uint8 of that shape; None is `2**(bits - 1)`.
        bits: Bits per code, 2 to 8.
        n_out: Rows.
        n_in: Columns.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    n_out: int
    n_in: int

    @property
    def planes(self) -> int:
        """Into how many parts decoding deals the columns, like cards: a part is one shift of all bytes."""
        n = 8 // gcd(8, self.bits)
        return n if self.n_in // self.scale.shape[1] % n == 0 else 1

    def deal(self, x: Tensor) -> Tensor:
        """Order the columns of `[rows, n_in]` as those of a slice."""
        return x if self.planes == 1 else x.unflatten(1, (-1, self.planes)).transpose(1, 2).reshape(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        """Undo `deal`."""
        return x.unflatten(1, (self.planes, -1)).transpose(1, 2).reshape(x.shape)


def row_slices(
    matrix: IntMatrix, dtype: torch.dtype, is_scaled: bool = True, factor: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows with what they decode to, the columns dealt; one part lies where the last one did.

    Args:
        matrix: What to decode.
        dtype: Of the parts.
        is_scaled: Whether they are multiplied by the scale.
        factor: How many times as large as usual the slices may be.
    """
    codes, scale, zero_point, bits, n_out, n_in = matrix
    n, planes = 8 // gcd(8, bits), matrix.planes
    n_bytes = n * bits // 8  # that hold n codes
    largest = factor * (_BUFFER if codes.device.type == "cpu" else _BUFFER_GPU)
    size = min(n_out, max(1, largest // n_in // _TILE) * _TILE)
    wide = torch.promote_types(dtype, torch.float32)
    buffer = torch.empty(-(-size * n_in // n) * n, dtype=wide, device=codes.device)
    factors = scale[:, None, :, None]
    zeros = 2 ** (bits - 1) if zero_point is None else zero_point.to(wide)[:, None, :, None]

    def own(grid: Tensor | int, part: slice) -> Tensor | int:
        return grid[part] if isinstance(grid, Tensor) and len(grid) > 1 else grid

    for start in range(0, n_out, size):
        rows = min(size, n_out - start)
        part = slice(start, start + rows)
        packed = codes[start * n_in * bits // 8 : -(-part.stop * n_in * bits // 8)]
        if planes == n:
            _unpack(packed.view(rows, n_in // n, n_bytes), bits, buffer[: rows * n_in].view(rows, n, n_in // n))
        else:
            packed = F.pad(packed, (0, -len(packed) % n_bytes)).view(-1, n_bytes)
            _unpack(packed, bits, buffer[: len(packed) * n].view(len(packed), n))
        values = buffer[: rows * n_in].view(rows, planes, scale.shape[1], -1)
        values -= own(zeros, part)
        if is_scaled:
            values *= own(factors, part)
        yield part, values.view(rows, n_in).to(dtype)


def _unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """Write the i-th code in each `packed[..., :]` to `out[:, i]`."""
    for i in range(out.shape[1]):
        first, shift = divmod(i * bits, 8)
        code = packed[..., first] >> shift if shift else packed[..., first]
        if shift + bits > 8:
            code = code | packed[..., first + 1] << 8 - shift
        out[:, i] = code if shift + bits == 8 else code & 2**bits - 1
