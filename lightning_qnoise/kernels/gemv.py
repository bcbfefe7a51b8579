"""`y = x W^T` of a few rows by decoding in registers; for a small K or a short `out`, where no table pays."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import check_codes, check_device, check_input, code_of, n_splits, sum_splits


@triton.jit
def gemv_kernel(
    x,
    words,
    codebook,
    partial,
    stride_m,
    stride_i,
    n_rows,
    n_in,
    n_out,
    n_words,
    words_per_split,
    groups,
    n_centroids,
    groups_per_codebook,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Multiply BLOCK_M rows of x by the blocks of some words; a lane decodes whole blocks of one output."""
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    e = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK_O, WIDTH, BLOCK_M], tl.float32)
    for q in range(split * words_per_split, tl.minimum((split + 1) * words_per_split, n_words)):
        word = tl.load(words + tl.cast(q, tl.int64) * n_out + rows, mask=rows < n_out, other=0)
        for j in tl.static_range(PER_WORD):
            group = q * PER_WORD + j
            # a group that only pads a word reads no x, but its address has to be one of the codebook's
            first = (tl.minimum(group, groups - 1) // groups_per_codebook) * n_centroids
            row = (first + code_of(word, j, BITS, PER_WORD)).to(tl.int64) * WIDTH
            values = tl.load(codebook + row[:, None] + e[None, :]).to(tl.float32)
            column = group * D + e
            used = (e < D) & (column < n_in)
            address = x + m[None, :].to(tl.int64) * stride_m + column[:, None].to(tl.int64) * stride_i
            inputs = tl.load(address, mask=used[:, None] & (m[None, :] < n_rows), other=0.0).to(tl.float32)
            total += values[:, :, None] * inputs[None, :, :]
    target = partial + (tl.cast(split, tl.int64) * n_rows + m[None, :]) * n_out + rows[:, None]
    tl.store(target, tl.sum(total, axis=1), mask=(m[None, :] < n_rows) & (rows[:, None] < n_out))


def pq_gemv(
    x: Tensor,
    words: Tensor,
    codebook: Tensor,
    block_size: int,
    bits: int = 8,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return `x W^T * scale + bias`, `[M, out]` in the dtype of `x`; each 4 rows decode the weight once.

    The sums are in float32 and in a fixed order.

    Args:
        x: `[M, in]`, of any strides.
        words: As for `pq_decode`.
        codebook: `[n_codebooks, K, width]` of `pad_codebook`.
        block_size: d, the columns of a block.
        bits: Bits per code.
        bias: `[out]` or None.
        scale: `[out]` or None.
        splits: Parts that `in` is divided into; by default as many as fill the GPU.

    Raises:
        ValueError: A layout or a device does not fit.
        TypeError: A dtype does not fit.
    """
    size = check_codes(words, codebook, x.shape[-1], block_size, bits)
    check_input(x, x.shape[-1], size.n_out, bias, scale)
    check_device(gemv_kernel, x, words, codebook, bias, scale)
    rows, n_in = x.shape
    if rows == 0 or size.n_out == 0:
        return x.new_empty(rows, size.n_out)
    n_words, block_m = len(words), min(triton.next_power_of_2(rows), 4 if size.width <= 8 else 2)
    programs, tiles = triton.cdiv(size.n_out, 128), triton.cdiv(rows, block_m)
    per_split = triton.cdiv(n_words, min(splits or n_splits(x.device, programs * tiles, n_words), n_words))
    splits = triton.cdiv(n_words, per_split)
    partial = x.new_empty(splits, rows, size.n_out, dtype=torch.float32)
    with torch.cuda.device_of(x):
        gemv_kernel[(programs, splits, tiles)](
            x,
            words,
            codebook,
            partial,
            *x.stride(),
            rows,
            n_in,
            size.n_out,
            n_words,
            per_split,
            size.groups,
            size.n_centroids,
            size.groups_per_codebook,
            D=block_size,
            WIDTH=size.width,
            BITS=bits,
            PER_WORD=size.per_word,
            BLOCK_M=block_m,
            BLOCK_O=128,
            num_warps=4,
            num_stages=1,
        )
        return sum_splits(partial, x.dtype, scale, bias)
