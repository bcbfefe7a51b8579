"""Exact-bit packing: `n` codes of `bits` bits become `ceil(n * bits / 8)` bytes, with no padding between codes."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 17  # codes packed at once; a multiple of 8, so that every chunk ends on a whole byte


def packed_length(n: int, bits: int) -> int:
    """Return the number of bytes that `n` codes of `bits` bits take."""
    return (n * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes into a byte stream.

    Args:
        codes: Integers in `[0, 2**bits)`, any shape and integer dtype, read in row-major order.
        bits: Bits per code, 1 to 16.

    Returns:
        uint8 `[ceil(n * bits / 8)]`; code `i` occupies the stream's bits `i * bits` to `(i + 1) * bits - 1`,
        lowest bit first.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0]), bits=2)
        tensor([57], dtype=torch.uint8)
    """
    flat = codes.flatten()
    if bits == 8:
        return flat.to(torch.uint8)
    if not flat.numel():
        return torch.empty(0, dtype=torch.uint8, device=flat.device)
    shifts = torch.arange(bits, device=flat.device, dtype=torch.int32)
    powers = (1 << torch.arange(8, device=flat.device)).to(torch.uint8)
    parts = []
    for chunk in flat.split(_CHUNK):
        stream = ((chunk.int()[:, None] >> shifts) & 1).to(torch.uint8).flatten()  # [n * bits]
        stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
        parts.append((stream * powers).sum(dim=1, dtype=torch.uint8))
    return torch.cat(parts)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Read `n` codes back from a byte stream written by `pack_bits`.

    Returns:
        int32 `[n]`.

    Example:
        >>> unpack_bits(torch.tensor([57], dtype=torch.uint8), bits=2, n=4)
        tensor([1, 2, 3, 0], dtype=torch.int32)
    """
    if bits == 8:
        return packed.int()
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        return ((packed[:, None] >> shifts) & (2**bits - 1)).flatten()[:n].int()
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    powers = 1 << torch.arange(bits, device=packed.device, dtype=torch.int32)
    out = torch.empty(n, dtype=torch.int32, device=packed.device)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        chunk = packed[start * bits // 8 : packed_length(stop, bits)]
        stream = ((chunk[:, None] >> shifts) & 1).flatten()[: (stop - start) * bits]
        out[start:stop] = (stream.view(-1, bits) * powers).sum(dim=1, dtype=torch.int32)
    return out
