"""`y = x W^T` of a few rows by lookups: the products of x with every centroid first, then one addition a code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import check_codes, check_device, check_input, code_of, n_splits, sum_splits

_UNROLL = 4  # words whose lookups are in flight at once


@triton.jit
def table_kernel(
    x,
    codebook,
    table,
    stride_m,
    stride_i,
    n_in,
    groups,
    table_groups,
    n_centroids,
    groups_per_codebook,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write `table[m, g, k] = x[m, g * D : (g + 1) * D] . codebook[k]`, zero in the groups that only pad a word.

    The groups of one program have one codebook each: BLOCK_G is 1 if there are several.
    """
    m = tl.program_id(2)
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # padding groups read no x, but their address has to be one of the codebook's
    first = (tl.minimum(tl.program_id(0) * BLOCK_G, groups - 1) // groups_per_codebook).to(tl.int64) * n_centroids
    total = tl.zeros([BLOCK_G, BLOCK_K], tl.float32)
    for e in tl.static_range(D):
        column = group * D + e
        address = x + tl.cast(m, tl.int64) * stride_m + column.to(tl.int64) * stride_i
        left = tl.load(address, mask=(group < groups) & (column < n_in), other=0.0).to(tl.float32)
        right = tl.load(codebook + (first + k) * WIDTH + e, mask=k < n_centroids, other=0.0).to(tl.float32)
        total += left[:, None] * right[None, :]
    target = table + (tl.cast(m, tl.int64) * table_groups + group[:, None]) * n_centroids + k[None, :]
    inside = (group[:, None] < table_groups) & (k[None, :] < n_centroids)
    tl.store(target, total.to(table.dtype.element_ty), mask=inside)


@triton.jit
def lookup_kernel(
    words,
    table,
    partial,
    n_rows,
    n_out,
    n_words,
    words_per_split,
    table_groups,
    n_centroids,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Add the entries of the table that the codes of some words name; lanes run along `out`.

    Past the end the last word is read again; its codes find the zeros that pad the table.
    """
    split = tl.program_id(1)
    m = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    start = split * words_per_split
    entries = table + (tl.cast(m, tl.int64) * table_groups + start * PER_WORD) * n_centroids
    total = tl.zeros([BLOCK_O], tl.float32)
    for first in range(start, start + words_per_split, UNROLL):
        for u in tl.static_range(UNROLL):
            q = tl.minimum(first + u, n_words - 1)
            word = tl.load(words + tl.cast(q, tl.int64) * n_out + rows, mask=rows < n_out, other=0)
            for j in tl.static_range(PER_WORD):
                total += tl.load(entries + j * n_centroids + code_of(word, j, BITS, PER_WORD)).to(tl.float32)
            entries += PER_WORD * n_centroids
    target = partial + (tl.cast(split, tl.int64) * n_rows + m) * n_out + rows
    tl.store(target, total, mask=rows < n_out)


def pq_table_gemv(
    x: Tensor,
    words: Tensor,
    codebook: Tensor,
    block_size: int,
    bits: int = 8,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    table_dtype: torch.dtype = torch.float32,
    splits: int | None = None,
) -> Tensor:
    """Return `x W^T * scale + bias`, `[M, out]` in the dtype of `x`; made for M <= 4 and out >= 2K.

    The sums are in float32 and in a fixed order.

    Args:
        x: `[M, in]`, of any strides.
        words: As for `pq_decode`.
        codebook: `[n_codebooks, K, width]` of `pad_codebook`.
        block_size: d, the columns of a block.
        bits: Bits per code.
        bias: `[out]` or None.
        scale: `[out]` or None.
        table_dtype: float32, or float16 for half the traffic and 11 bits of each product.
        splits: Parts that `in` is divided into; by default as many as fill the GPU.

    Raises:
        ValueError: A layout or a device does not fit.
        TypeError: A dtype does not fit.
    """
    if table_dtype not in (torch.float32, torch.float16):
        raise TypeError(f"the table is in float32 or float16, got {table_dtype}")
    size = check_codes(words, codebook, x.shape[-1], block_size, bits)
    check_input(x, x.shape[-1], size.n_out, bias, scale)
    check_device(lookup_kernel, x, words, codebook, bias, scale)
    rows, n_in = x.shape
    if rows == 0 or size.n_out == 0:
        return x.new_empty(rows, size.n_out)
    n_words, block_o = len(words), 256 if size.n_out > 2048 else 128
    steps, programs = triton.cdiv(n_words, _UNROLL), triton.cdiv(size.n_out, block_o)
    per_split = triton.cdiv(steps, min(splits or n_splits(x.device, programs * rows, steps), steps)) * _UNROLL
    splits = triton.cdiv(n_words, per_split)
    table_groups = splits * per_split * size.per_word
    table = x.new_empty(rows, table_groups, size.n_centroids, dtype=table_dtype)
    partial = x.new_empty(splits, rows, size.n_out, dtype=torch.float32)
    block_g = 16 if len(codebook) == 1 else 1
    block_k = min(triton.next_power_of_2(size.n_centroids), 128)
    with torch.cuda.device_of(x):
        table_kernel[(triton.cdiv(table_groups, block_g), triton.cdiv(size.n_centroids, block_k), rows)](
            x,
            codebook,
            table,
            *x.stride(),
            n_in,
            size.groups,
            table_groups,
            size.n_centroids,
            size.groups_per_codebook,
            D=block_size,
            WIDTH=size.width,
            BLOCK_G=block_g,
            BLOCK_K=block_k,
            num_warps=4,
        )
        lookup_kernel[(programs, splits, rows)](
            words,
            table,
            partial,
            rows,
            size.n_out,
            n_words,
            per_split,
            table_groups,
            size.n_centroids,
            BITS=bits,
            PER_WORD=size.per_word,
            UNROLL=_UNROLL,
            BLOCK_O=block_o,
            num_warps=4,
        )
        return sum_splits(partial, x.dtype, scale, bias)
