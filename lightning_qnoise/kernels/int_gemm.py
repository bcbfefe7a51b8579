"""`y = x W^T` for a weight of packed integers, of up to 256 rows: a tile of bytes becomes the left operand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import (
    TL_DTYPES,
    check_device,
    check_dtypes,
    interpreted,
    n_splits,
    sum_splits,
)


@triton.jit
def int_gemm_kernel(
    x,
    codes,
    scale,
    zeros,
    partial,
    stride_m,
    stride_byte,
    stride_code,
    n_rows,
    n_out,
    row_bytes,
    scale_stride,
    steps,
    steps_per_split,
    steps_per_group,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Accumulate `[BLOCK_O, BLOCK_M]` over some steps of BLOCK_B bytes of a row; one product per code in a byte."""
    PER_BYTE: tl.constexpr = 8 // BITS
    split = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = rows * scale_stride  # 0 where one scale serves all rows
    total = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    zero = tl.full([BLOCK_O], 1 << (BITS - 1), tl.int32)
    if zeros is not None and not GROUPED:
        zero = tl.load(zeros + first, mask=rows < n_out, other=0).to(tl.int32)
    for step in range(split * steps_per_split, tl.minimum((split + 1) * steps_per_split, steps)):
        byte = step * BLOCK_B + tl.arange(0, BLOCK_B)
        inside = (rows[:, None] < n_out) & (byte[None, :] < row_bytes)
        packed = tl.load(codes + rows[:, None].to(tl.int64) * row_bytes + byte[None, :], mask=inside, other=0)
        if GROUPED:
            at = first + step // steps_per_group
            factor = tl.load(scale + at, mask=rows < n_out, other=0.0)
            if zeros is not None:
                zero = tl.load(zeros + at, mask=rows < n_out, other=0).to(tl.int32)
            part = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
        else:
            part = total
        for i in tl.static_range(PER_BYTE):
            code = (packed.to(tl.int32) >> (i * BITS)) & ((1 << BITS) - 1)
            weight = (code - zero[:, None]).to(tl.float32).to(DOT_DTYPE)  # at most 255, exact in every dtype
            source = x + m[None, :].to(tl.int64) * stride_m + byte[:, None].to(tl.int64) * stride_byte
            source += i * stride_code
            used = (byte[:, None] < row_bytes) & (m[None, :] < n_rows)
            inputs = tl.load(source, mask=used, other=0.0).to(tl.float32).to(DOT_DTYPE)
            part = tl.dot(weight, inputs, part, input_precision="ieee")
        total = total + part * factor[:, None] if GROUPED else part
    if not GROUPED:
        total *= tl.load(scale + first, mask=rows < n_out, other=0.0)[:, None]
    target = partial + (tl.cast(split, tl.int64) * n_rows + m[None, :]) * n_out + rows[:, None]
    tl.store(target, total, mask=(m[None, :] < n_rows) & (rows[:, None] < n_out))


def int_gemm(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bits: int = 8,
    bias: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return `x W^T + bias` for `W = (codes - zero_point) * scale`, `[M, out]` in the dtype of `x`; for M <= 256.

    Each 128 rows, 64 in float32 or with groups, decode the weight once. Whole numbers are multiplied; the scale meets
    the sums, which are in float32 and in a fixed order.

    Args:
        x: `[M, in]`, of any strides, float16, bfloat16 or float32.
        codes: uint8 `[out, in * bits / 8]`, contiguous; of two codes in a byte, the first has the low bits.
        scale: float32 `[1, 1]` or `[out, groups]`, contiguous; with several groups each takes whole blocks of 16 bytes.
        zero_point: uint8 of the shape of `scale`, contiguous; None is `2**(bits - 1)`.
        bits: 4 or 8.
        bias: `[out]` or None.
        splits: Parts that `in` is divided into; by default as many as fill the GPU.

    Raises:
        ValueError: A layout or a device does not fit.
        TypeError: A dtype does not fit.
    """
    _check(x, codes, scale, zero_point, bits, bias)
    (n_rows, n_in), (n_out, row_bytes) = x.shape, codes.shape
    if n_rows == 0 or n_out == 0:
        return x.new_empty(n_rows, n_out)
    strides = (*x.stride(), 0)
    if bits == 4:  # the inputs of low nibbles, then those of high ones: both are read by wide, asynchronous copies
        x, strides = x.unflatten(1, (row_bytes, 2)).transpose(1, 2).contiguous(), (n_in, 1, row_bytes)
    # what keeps all in registers; float32 has no tensor cores and takes more of them
    single, grouped = x.dtype == torch.float32, scale.shape[1] > 1
    block_m = max(16, min(triton.next_power_of_2(n_rows), 64 if single or grouped else 128))
    block_b, group_bytes = 32 if single or bits == 4 else 64, row_bytes // scale.shape[1]
    if grouped:
        block_b = min(block_b, group_bytes & -group_bytes)
    programs, tiles = triton.cdiv(n_out, 64), triton.cdiv(n_rows, block_m)
    steps = max(1, triton.cdiv(row_bytes, block_b))
    per_split = triton.cdiv(steps, min(splits or n_splits(x.device, programs * tiles, steps, 2), steps))
    splits = triton.cdiv(steps, per_split)
    partial = x.new_empty(splits, n_rows, n_out, dtype=torch.float32)
    with torch.cuda.device_of(x):
        int_gemm_kernel[(programs, tiles, splits)](
            x,
            codes,
            scale,
            zero_point,
            partial,
            *strides,
            n_rows,
            n_out,
            row_bytes,
            scale.shape[1] if len(scale) > 1 else 0,
            steps,
            per_split,
            group_bytes // block_b,
            BITS=bits,
            GROUPED=grouped,
            BLOCK_M=block_m,
            BLOCK_O=64,
            BLOCK_B=block_b,
            DOT_DTYPE=tl.float32 if interpreted(int_gemm_kernel) else TL_DTYPES[x.dtype],
            num_warps=8 if single else 4,
            num_stages=2 if single else 4,
        )
        return sum_splits(partial, x.dtype, None, bias)


def _check(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, bias: Tensor | None) -> None:
    check_dtypes(x, bias)
    stored = {codes.dtype, torch.uint8 if zero_point is None else zero_point.dtype}
    if stored != {torch.uint8} or scale.dtype != torch.float32 or bits not in (4, 8):
        got = f"{bits} bits in {sorted(map(str, stored))}, {scale.dtype}"
        raise TypeError(f"codes of 4 or 8 bits and zero points are uint8, scales float32; got {got}")
    if x.ndim != 2 or codes.ndim != 2 or x.shape[1] * bits != codes.shape[1] * 8 or not codes.is_contiguous():
        shapes = f"{list(x.shape)} and {list(codes.shape)} with strides {codes.stride()}"
        raise ValueError(f"x is [M, in] and codes contiguous [out, in * {bits} / 8], got {shapes}")
    n_out, row_bytes = codes.shape
    if scale.ndim != 2 or not (tuple(scale.shape) == (1, 1) or len(scale) == n_out) or not scale.is_contiguous():
        raise ValueError(f"the scale is contiguous [1, 1] or [{n_out}, groups], got {list(scale.shape)}")
    if scale.shape[1] != 1 and (not scale.shape[1] or not row_bytes or row_bytes % (16 * scale.shape[1])):
        raise ValueError(f"groups are multiples of 16 bytes: {row_bytes} in a row, {scale.shape[1]} groups")
    if zero_point is not None and (zero_point.shape != scale.shape or not zero_point.is_contiguous()):
        raise ValueError(f"the zero points are contiguous {list(scale.shape)}, got {list(zero_point.shape)}")
    if bias is not None and (bias.shape != (n_out,) or not bias.is_contiguous()):
        raise ValueError(f"the bias is contiguous [{n_out}], got {list(bias.shape)}")
    check_device(int_gemm_kernel, x, codes, scale, zero_point, bias)
