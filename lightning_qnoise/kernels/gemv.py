"""`y = x W^T` of a few rows by decoding in registers; for a small K or a short `out`, where no table pays."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import (
    check_device,
    check_input,
    code_of,
    code_tiles,
    most_splits,
    n_splits,
    product_of_nothing,
    split_tile,
    sum_splits,
    tile_pointers,
)
from lightning_qnoise.kernels.layout import pad_codebook


@triton.jit
def gemv_kernel(
    x,
    words,
    codebook,
    partial,
    stride_m,
    stride_i,
    stride_o,
    stride_w,
    n_rows,
    n_out,
    steps,
    steps_per_split,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_WORD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PART: tl.constexpr,
):
    """Multiply BLOCK_M rows of x by some steps of the weight; a lane decodes one output, PART elements at a time."""
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    start = split * steps_per_split
    stop = tl.minimum(start + steps_per_split, steps)
    source = tile_pointers(words, rows, n_out, stride_o, stride_w, TILE)
    same = tl.zeros([BLOCK_O, 1], tl.int32)  # every lane loads the same x, in the layout of the weight
    totals = ()
    for _ in tl.static_range(BLOCK_M):
        totals += (tl.zeros([BLOCK_O, PART], tl.float32),)  # type: ignore[assignment]
    tile = tl.load(source + tl.cast(start, tl.int64) * TILE * stride_w)
    for step in range(start, stop):
        # the next codes are on their way while these are used
        following = tl.load(source + tl.cast(tl.minimum(step + 1, stop - 1), tl.int64) * TILE * stride_w)
        first = x + tl.cast(step, tl.int64) * (TILE * PER_WORD * D) * stride_i
        columns = split_tile(tile, TILE)
        for t in tl.static_range(TILE):
            for j in tl.static_range(PER_WORD):
                row = codebook + code_of(columns[t], j, PER_WORD).to(tl.int64)[:, None] * WIDTH
                for part in tl.static_range(0, D, PART):
                    e = part + tl.arange(0, PART)[None, :]
                    values = tl.load(row + e).to(tl.float32)
                    sums = ()
                    for i in tl.static_range(BLOCK_M):
                        inputs = first + tl.minimum(m + i, n_rows - 1).to(tl.int64) * stride_m
                        inputs += ((t * PER_WORD + j) * D + e + same).to(tl.int64) * stride_i
                        left = tl.load(inputs, mask=e < D, other=0.0).to(tl.float32)
                        sums += (tl.fma(values, left, totals[i]),)  # type: ignore
                    totals = sums
        tile = following
    for i in tl.static_range(BLOCK_M):
        # past the end the last row of x has been computed, and is written, again
        target = partial + (tl.cast(split, tl.int64) * n_rows + tl.minimum(m + i, n_rows - 1)) * n_out + rows
        tl.store(target, tl.sum(totals[i], axis=1), mask=rows < n_out)


def pq_gemv(
    x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, splits: int | None = None
) -> Tensor:
    """Return `x W^T + bias`, `[M, out]` in the dtype of `x`; each 4 rows decode the weight once.

    The sums are in float32 and in a fixed order.

    Args:
        x: `[M, groups * d]`, of any strides, float16, bfloat16 or float32.
        codes: As for `pq_decode`.
        codebook: `[K, d]`, which is cast to the dtype of `x`; d is 32 at most.
        bias: Contiguous `[out]` or None.
        splits: Parts that `in` is divided into; by default as many as fill the GPU and an eighth of the bytes of the
            codes.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
    """
    check_input(x, codes, codebook, bias, splits)
    check_device(gemv_kernel, x, codes, codebook, bias)
    (rows, n_in), n_out, d = x.shape, len(codes), codebook.shape[1]
    if rows == 0 or n_out == 0 or n_in == 0:
        return product_of_nothing(x, n_out, bias)
    codebook, tiles = pad_codebook(codebook.to(x.dtype)), code_tiles(codes, 4 if d <= 8 else 1)
    width, block_m = codebook.shape[1], min(triton.next_power_of_2(rows), 4)
    programs, row_tiles = triton.cdiv(n_out, 128), triton.cdiv(rows, block_m)
    most = most_splits(codes, rows, 8)
    per_split = triton.cdiv(tiles.steps, splits or n_splits(x.device, programs * row_tiles, tiles.steps, most=most))
    splits = triton.cdiv(tiles.steps, per_split)
    partial = x.new_empty(splits, rows, n_out, dtype=torch.float32)
    with torch.cuda.device_of(x):
        gemv_kernel[(programs, splits, row_tiles)](
            x,
            tiles.words,
            codebook,
            partial,
            *x.stride(),
            *tiles.strides,
            rows,
            n_out,
            tiles.steps,
            per_split,
            D=d,
            WIDTH=width,
            PER_WORD=tiles.per_word,
            TILE=tiles.tile,
            BLOCK_M=block_m,
            BLOCK_O=128,
            PART=min(width, 16 // x.element_size()),  # of one load
            num_warps=4,
            num_stages=1,  # more would fetch the codebook past the L1 cache
        )
        return sum_splits(partial, x.dtype, bias=bias)
