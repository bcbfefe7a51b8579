"""`y = x W^T` of 16 to 256 rows: each tile of the weight is decoded once, as the left operand of the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import (
    TL_DTYPES,
    check_codes,
    check_device,
    check_input,
    code_of,
    interpreted,
    n_splits,
    sum_splits,
)


@triton.jit
def gemm_kernel(
    x,
    words,
    codebook,
    partial,
    stride_m,
    stride_i,
    n_rows,
    n_in,
    n_out,
    steps,
    steps_per_split,
    groups,
    n_centroids,
    groups_per_codebook,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Accumulate `[BLOCK_O, BLOCK_M]` over some steps of BLOCK_G groups; tensor cores take W from registers."""
    split = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    flat = tl.arange(0, BLOCK_G * WIDTH)  # elements of the decoded blocks, WIDTH each
    e = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    for step in range(split * steps_per_split, tl.minimum((split + 1) * steps_per_split, steps)):
        group = step * BLOCK_G + tl.arange(0, BLOCK_G)
        inside = (rows[:, None] < n_out) & (group[None, :] < groups)
        address = words + (group // PER_WORD)[None, :].to(tl.int64) * n_out + rows[:, None]
        code = code_of(tl.load(address, mask=inside, other=0), group[None, :], BITS, PER_WORD)
        # past the last group x reads 0, but the address has to be one of the codebook's
        row = (tl.minimum(group, groups - 1) // groups_per_codebook)[None, :] * n_centroids + code
        weight = tl.load(codebook + row[:, :, None].to(tl.int64) * WIDTH + e[None, None, :])
        weight = weight.to(tl.float32).to(DOT_DTYPE).reshape(BLOCK_O, BLOCK_G * WIDTH)
        column = (step * BLOCK_G + flat // WIDTH) * D + flat % WIDTH
        used = (flat % WIDTH < D) & (column < n_in)
        source = x + m[None, :].to(tl.int64) * stride_m + column[:, None].to(tl.int64) * stride_i
        inputs = tl.load(source, mask=used[:, None] & (m[None, :] < n_rows), other=0.0)
        total = tl.dot(weight, inputs.to(tl.float32).to(DOT_DTYPE), total, input_precision="ieee")
    target = partial + (tl.cast(split, tl.int64) * n_rows + m[None, :]) * n_out + rows[:, None]
    tl.store(target, total, mask=(m[None, :] < n_rows) & (rows[:, None] < n_out))


def pq_gemm(
    x: Tensor,
    words: Tensor,
    codebook: Tensor,
    block_size: int,
    bits: int = 8,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return `x W^T * scale + bias`, `[M, out]` in the dtype of `x`; made for 16 <= M <= 256.

    Each 128 rows, 64 in float32, decode the weight once. The sums are in float32 and in a fixed order.

    Args:
        x: `[M, in]`, of any strides.
        words: As for `pq_decode`.
        codebook: `[n_codebooks, K, width]` of `pad_codebook`.
        block_size: d, the columns of a block, at most 64.
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
    check_device(gemm_kernel, x, words, codebook, bias, scale)
    if size.width > 64:
        raise ValueError(f"pq_gemm takes blocks of 64 columns at most, got {block_size}")
    rows, n_in = x.shape
    if rows == 0 or size.n_out == 0:
        return x.new_empty(rows, size.n_out)
    single = x.dtype == torch.float32  # without tensor cores, the operands take registers
    block_m, block_g = max(16, min(triton.next_power_of_2(rows), 64 if single else 128)), 64 // size.width
    programs, tiles = triton.cdiv(size.n_out, 64), triton.cdiv(rows, block_m)
    steps = triton.cdiv(size.groups, block_g)
    per_split = triton.cdiv(steps, min(splits or n_splits(x.device, programs * tiles, steps, 2), steps))
    splits = triton.cdiv(steps, per_split)
    partial = x.new_empty(splits, rows, size.n_out, dtype=torch.float32)
    with torch.cuda.device_of(x):
        gemm_kernel[(programs, tiles, splits)](
            x,
            words,
            codebook,
            partial,
            *x.stride(),
            rows,
            n_in,
            size.n_out,
            steps,
            per_split,
            size.groups,
            size.n_centroids,
            size.groups_per_codebook,
            D=block_size,
            WIDTH=size.width,
            BITS=bits,
            PER_WORD=size.per_word,
            BLOCK_M=block_m,
            BLOCK_O=64,
            BLOCK_G=block_g,
            DOT_DTYPE=tl.float32 if interpreted(gemm_kernel) else TL_DTYPES[x.dtype],
            num_warps=8 if single else 4,
            num_stages=1,  # more would fetch the codebook past the L1 cache
        )
        return sum_splits(partial, x.dtype, scale, bias)
