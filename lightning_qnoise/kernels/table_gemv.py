"""`y = x W^T` of a few rows by lookups: the products of x with every centroid first, then one addition a code."""

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
def table_kernel(
    x,
    codebook,
    table,
    stride_m,
    stride_i,
    groups,
    n_centroids,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
):
    """Write `table[m, g, k] = x[m, g * D : (g + 1) * D] . codebook[k]` of BLOCK_G groups; a lane has one centroid."""
    m = tl.cast(tl.program_id(2), tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = codebook + tl.minimum(k, n_centroids - 1).to(tl.int64)[:, None] * WIDTH
    same = tl.zeros([BLOCK_K, 1], tl.int32)  # every lane loads the same x, in the layout of the codebook
    for i in tl.static_range(BLOCK_G):
        # past the end the last group is written again
        group = tl.cast(tl.minimum(tl.program_id(0) * BLOCK_G + i, groups - 1), tl.int64)
        inputs = x + m * stride_m + group * D * stride_i
        total = tl.zeros([BLOCK_K, PART], tl.float32)
        for part in tl.static_range(0, D, PART):
            e = part + tl.arange(0, PART)[None, :]
            left = tl.load(inputs + (e + same).to(tl.int64) * stride_i, mask=e < D, other=0.0).to(tl.float32)
            total = tl.fma(tl.load(row + e).to(tl.float32), left, total)
        target = table + (m * groups + group) * n_centroids + k
        tl.store(target, tl.sum(total, axis=1).to(table.dtype.element_ty), mask=k < n_centroids)


@triton.jit
def lookup_kernel(
    words,
    table,
    partial,
    stride_o,
    stride_w,
    n_rows,
    n_out,
    groups,
    steps,
    steps_per_split,
    n_centroids,
    PER_WORD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Add the entries of the table that the codes of some steps name; a lane has one output."""
    split = tl.program_id(1)
    m = tl.cast(tl.program_id(2), tl.int64)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    start = split * steps_per_split
    stop = tl.minimum(start + steps_per_split, steps)
    source = tile_pointers(words, rows, n_out, stride_o, stride_w, TILE)
    entries = table + (m * groups + start * (TILE * PER_WORD)) * n_centroids
    total = tl.zeros([BLOCK_O], tl.float32)
    tile = tl.load(source + tl.cast(start, tl.int64) * TILE * stride_w)
    for step in range(start, stop):
        # the next codes are on their way while these are used
        following = tl.load(source + tl.cast(tl.minimum(step + 1, stop - 1), tl.int64) * TILE * stride_w)
        columns = split_tile(tile, TILE)
        for t in tl.static_range(TILE):
            for j in tl.static_range(PER_WORD):
                total += tl.load(entries + code_of(columns[t], j, PER_WORD)).to(tl.float32)
                entries += n_centroids
        tile = following
    target = partial + (tl.cast(split, tl.int64) * n_rows + m) * n_out + rows
    tl.store(target, total, mask=rows < n_out)


def pq_table_gemv(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    table_dtype: torch.dtype = torch.float32,
    splits: int | None = None,
) -> Tensor:
    """Return `x W^T + bias`, `[M, out]` in the dtype of `x`; made for one row and 32 outputs a codeword or more.

    The sums are in float32 and in a fixed order. The table takes `M * groups * K` elements.

    Args:
        x: `[M, groups * d]`, of any strides, float16, bfloat16 or float32.
        codes: As for `pq_decode`.
        codebook: `[K, d]`, which is cast to the dtype of `x`; d is 32 at most.
        bias: Contiguous `[out]` or None.
        table_dtype: float32, or float16 for half the traffic and 11 bits of each product.
        splits: Parts that `in` is divided into; by default as many as fill the GPU and 1/16 of the bytes of the codes.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
    """
    if table_dtype not in (torch.float32, torch.float16):
        raise TypeError(f"the table is in float32 or float16, got {table_dtype}")
    check_input(x, codes, codebook, bias, splits)
    check_device(lookup_kernel, x, codes, codebook, bias)
    rows, (n_out, groups), (k, d) = len(x), codes.shape, codebook.shape
    if rows == 0 or n_out == 0 or groups == 0:
        return product_of_nothing(x, n_out, bias)
    codebook, tiles = pad_codebook(codebook.to(x.dtype)), code_tiles(codes)
    width, block_o = codebook.shape[1], 256 if n_out > 2048 else 128
    programs, processors = triton.cdiv(n_out, block_o), 512 // block_o
    most = most_splits(codes, rows, 16)
    per_split = triton.cdiv(tiles.steps, splits or n_splits(x.device, programs * rows, tiles.steps, processors, most))
    splits = triton.cdiv(tiles.steps, per_split)
    table = x.new_empty(rows, groups, k, dtype=table_dtype)
    partial = x.new_empty(splits, rows, n_out, dtype=torch.float32)
    with torch.cuda.device_of(x):
        table_kernel[(triton.cdiv(groups, 8), triton.cdiv(k, 128), rows)](
            x,
            codebook,
            table,
            *x.stride(),
            groups,
            k,
            D=d,
            WIDTH=width,
            BLOCK_G=8,
            BLOCK_K=128,
            PART=min(width, 16 // x.element_size()),  # of one load
            num_warps=4,
        )
        lookup_kernel[(programs, splits, rows)](
            tiles.words,
            table,
            partial,
            *tiles.strides,
            rows,
            n_out,
            groups,
            tiles.steps,
            per_split,
            k,
            PER_WORD=tiles.per_word,
            TILE=tiles.tile,
            BLOCK_O=block_o,
            num_warps=block_o // 32,
            num_stages=1,  # the loop prefetches by itself
        )
        return sum_splits(partial, x.dtype, bias=bias)
