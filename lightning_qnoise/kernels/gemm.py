"""`y = x W^T` of 16 to 256 rows: each tile of the weight is decoded once, as the left operand of the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import (
    TL_DTYPES,
    check_device,
    check_input,
    interpreted,
    n_splits,
    product_of_nothing,
    sum_splits,
)
from lightning_qnoise.kernels.layout import pad_codebook


@triton.jit
def gemm_kernel(
    x,
    codes,
    codebook,
    partial,
    stride_m,
    stride_i,
    stride_o,
    stride_g,
    n_rows,
    n_out,
    groups,
    steps,
    steps_per_split,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Accumulate `[BLOCK_O, BLOCK_M]` over some steps of BLOCK_G groups; tensor cores take W from registers.

    Neighbouring lanes have neighbouring groups, whose codes they read one by one.
    """
    split = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = split * steps_per_split
    stop = tl.minimum(start + steps_per_split, steps)
    flat = tl.arange(0, BLOCK_G * WIDTH)  # elements of the decoded blocks, WIDTH each
    e = tl.arange(0, WIDTH)[None, None, :]
    source = codes + tl.minimum(rows, n_out - 1).to(tl.int64)[:, None] * stride_o
    group = tl.minimum(start * BLOCK_G + tl.arange(0, BLOCK_G), groups - 1)
    code = tl.load(source + group[None, :].to(tl.int64) * stride_g)
    total = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    for step in range(start, stop):
        # the next codes are on their way while these are used; past the last group x reads 0
        group = tl.minimum((step + 1) * BLOCK_G + tl.arange(0, BLOCK_G), groups - 1)
        following = tl.load(source + group[None, :].to(tl.int64) * stride_g)
        weight = tl.load(codebook + code.to(tl.int64)[:, :, None] * WIDTH + e)
        weight = weight.to(tl.float32).to(DOT_DTYPE).reshape(BLOCK_O, BLOCK_G * WIDTH)
        column = (step * BLOCK_G + flat // WIDTH) * D + flat % WIDTH
        used = (flat % WIDTH < D) & (column < groups * D)
        inputs = x + m[None, :].to(tl.int64) * stride_m + column[:, None].to(tl.int64) * stride_i
        right = tl.load(inputs, mask=used[:, None] & (m[None, :] < n_rows), other=0.0)
        total = tl.dot(weight, right.to(tl.float32).to(DOT_DTYPE), total, input_precision="ieee")
        code = following
    target = partial + (tl.cast(split, tl.int64) * n_rows + m[None, :]) * n_out + rows[:, None]
    tl.store(target, total, mask=(m[None, :] < n_rows) & (rows[:, None] < n_out))


def pq_gemm(
    x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, splits: int | None = None
) -> Tensor:
    """Return `x W^T + bias`, `[M, out]` in the dtype of `x`; made for 16 <= M <= 256.

    Each 128 rows, 32 in float32, decode the weight once. The sums are in float32 and in a fixed order.

    Args:
        x: `[M, groups * d]`, of any strides, float16, bfloat16 or float32.
        codes: As for `pq_decode`.
        codebook: `[K, d]`, which is cast to the dtype of `x`; d is 32 at most.
        bias: Contiguous `[out]` or None.
        splits: Parts that `in` is divided into; by default as many as fill the GPU.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
    """
    check_input(x, codes, codebook, bias, splits)
    check_device(gemm_kernel, x, codes, codebook, bias)
    rows, (n_out, groups), d = len(x), codes.shape, codebook.shape[1]
    if rows == 0 or n_out == 0 or groups == 0:
        return product_of_nothing(x, n_out, bias)
    codebook, single = pad_codebook(codebook.to(x.dtype)), x.dtype == torch.float32
    width = codebook.shape[1]
    # float32 runs without tensor cores, and the operands take registers
    block_m, block_g = max(16, min(triton.next_power_of_2(rows), 32 if single else 128)), 64 // width
    programs, row_tiles, steps = triton.cdiv(n_out, 64), triton.cdiv(rows, block_m), triton.cdiv(groups, block_g)
    per_split = triton.cdiv(steps, splits or n_splits(x.device, programs * row_tiles, steps, 2))
    splits = triton.cdiv(steps, per_split)
    partial = x.new_empty(splits, rows, n_out, dtype=torch.float32)
    with torch.cuda.device_of(x):
        gemm_kernel[(programs, row_tiles, splits)](
            x,
            codes,
            codebook,
            partial,
            *x.stride(),
            *codes.stride(),
            rows,
            n_out,
            groups,
            steps,
            per_split,
            D=d,
            WIDTH=width,
            BLOCK_M=block_m,
            BLOCK_O=64,
            BLOCK_G=block_g,
            DOT_DTYPE=tl.float32 if interpreted(gemm_kernel) else TL_DTYPES[x.dtype],
            num_warps=8 if single or width < 8 or width > d else 4,  # many codes or addresses take registers, too
            num_stages=1,  # more would fetch the codebook past the L1 cache
        )
        return sum_splits(partial, x.dtype, bias=bias)
