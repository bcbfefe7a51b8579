"""Quant-Noise of a weight in one pass: what is masked is decided by Philox within the kernel, once a block.

The mask is a function of seed, row and block alone, the one that `ops.philox` documents, whatever the tiles are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import check_device, check_dtypes

_TILE = 2048  # elements of a program
_WIDEST = 64  # elements of a block that a program has at once


@triton.jit
def draw_masks(seed, rate, row, quad, BLOCK_O: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return bool `[BLOCK_O, 4 * BLOCK_Q]` of the rows `[BLOCK_O, 1]` and the quads of blocks `[1, BLOCK_Q]`."""
    threshold = (tl.minimum(tl.maximum(tl.load(rate), 0.0), 1.0) * 16777216.0).to(tl.int32)
    c0 = tl.broadcast_to(quad.to(tl.uint32), [BLOCK_O, BLOCK_Q])
    c1 = tl.broadcast_to(row.to(tl.uint32), [BLOCK_O, BLOCK_Q])
    zero = tl.zeros([BLOCK_O, BLOCK_Q], tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, zero, zero)
    even = tl.join((w0 >> 8).to(tl.int32) < threshold, (w2 >> 8).to(tl.int32) < threshold)
    odd = tl.join((w1 >> 8).to(tl.int32) < threshold, (w3 >> 8).to(tl.int32) < threshold)
    return tl.reshape(tl.join(even, odd), [BLOCK_O, 4 * BLOCK_Q])


@triton.jit
def block_noise_kernel(
    weight,
    seed,
    rate,
    codes,
    table,
    out,
    rows,
    blocks,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One program writes `4 * BLOCK_Q` blocks of `BLOCK_O` rows, or `WIDTH` elements of each where they are long."""
    tiles = tl.cdiv(blocks, 4 * BLOCK_Q)
    first = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    block = first * 4 * BLOCK_Q + tl.arange(0, 4 * BLOCK_Q)[None, :]
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    inside = (row < rows) & (block < blocks)
    used = inside[:, :, None] & (e < UNIT) if UNIT % WIDTH else inside[:, :, None]
    place = row.to(tl.int64) * blocks + block
    value = tl.load(weight + place[:, :, None] * UNIT + e, mask=used, other=0.0)
    mask = draw_masks(seed, rate, row, first * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :], BLOCK_O, BLOCK_Q)
    noisy = tl.zeros_like(value)
    if table is not None:
        if codes is not None:
            code = tl.load(codes + place, mask=inside & mask, other=0).to(tl.int64)
            noisy = tl.load(table + code[:, :, None] * UNIT + e, mask=used & mask[:, :, None], other=0.0)
        else:
            noisy = tl.load(table + e, mask=e < UNIT, other=0.0)
        noisy = noisy.to(tl.float32).to(value.dtype)
    tl.store(out + place[:, :, None] * UNIT + e, tl.where(mask[:, :, None], noisy, value), mask=used)


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has to be contiguous, got {list(tensor.shape)} with strides {tensor.stride()}")


def tiles_of(rows: int, blocks: int, width: int) -> tuple[tuple[int], int, int]:
    """Return the grid, the rows of a tile, and the quads of blocks in a row of it."""
    quads = min(triton.next_power_of_2(triton.cdiv(blocks, 4)), _TILE // (4 * width))
    block_o = min(triton.next_power_of_2(rows), _TILE // (4 * quads * width))
    return (triton.cdiv(rows, block_o) * triton.cdiv(blocks, 4 * quads),), block_o, quads


def block_noise(
    weight: Tensor, seed: Tensor, rate: Tensor, unit: int, codes: Tensor | None, table: Tensor | None
) -> Tensor:
    """Return the weight with some blocks replaced by rows of a table, see `ops.fake_quant_noise`.

    Args:
        weight: `[rows, cols]`, contiguous, float16, bfloat16 or float32.
        seed: int64 `[1]`.
        rate: float32 `[]`.
        unit: Elements of a block; divides `cols`.
        codes: Integers `[rows, cols // unit]`, contiguous: the row of each block; None is row 0.
        table: Float `[K, unit]`, contiguous; None is zeros.

    Raises:
        ValueError: A layout or a device does not fit.
        TypeError: A dtype does not fit.
    """
    check_dtypes(weight, table)
    check_device(block_noise_kernel, weight, seed, rate, codes, table)
    check_contiguous(weight=weight, codes=codes, table=table)
    rows, cols = weight.shape
    if cols % unit or (table is not None and table.shape[1:] != (unit,)):
        table_is = None if table is None else list(table.shape)
        raise ValueError(f"blocks of {unit} do not fit a weight {[rows, cols]} and a table {table_is}")
    if codes is not None and codes.shape != (rows, cols // unit):
        raise ValueError(f"codes are {[rows, cols // unit]}, got {list(codes.shape)}")
    out = weight.new_empty(rows, cols)
    if out.numel() == 0:
        return out
    width = min(triton.next_power_of_2(unit), _WIDEST)
    (programs,), block_o, block_q = tiles_of(rows, cols // unit, width)
    with torch.cuda.device_of(weight):
        block_noise_kernel[(programs, triton.cdiv(unit, width))](
            weight,
            seed,
            rate,
            codes,
            table,
            out,
            rows,
            cols // unit,
            UNIT=unit,
            WIDTH=width,
            BLOCK_O=block_o,
            BLOCK_Q=block_q,
            num_warps=4,
        )
    return out
