"""Quant-Noise of integers in one pass, and its gradient: every element is rounded on its own, or not."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import check_device, check_dtypes
from lightning_qnoise.kernels.noise import check_contiguous, draw_masks, tiles_of


@triton.jit
def load_grid(scale, zero_point, row, column, rows, cols, groups, size, GROUPED: tl.constexpr, LEVELS: tl.constexpr):
    """Return scale and zero point, float32 `[BLOCK_O, 1]`, or `[BLOCK_O, BLOCK_C]` where a row has several."""
    place = row.to(tl.int64) * groups  # no groups: the one scale of a tensor
    inside = row < rows
    if GROUPED:
        place = place + column // size
        inside = inside & (column < cols)
    s = tl.load(scale + place, mask=inside, other=1.0)
    if zero_point is None:
        zero = tl.full([1, 1], (LEVELS + 1) // 2, tl.float32)
    else:
        zero = tl.load(zero_point + place, mask=inside, other=0).to(tl.float32)
    return s, zero


@triton.jit
def ends_of(s, zero, LEVELS: tl.constexpr, dtype: tl.constexpr):
    """Return the ends of the range as they are in a dtype, in float32."""
    return ((0.0 - zero) * s).to(dtype).to(tl.float32), ((LEVELS - zero) * s).to(dtype).to(tl.float32)


@triton.jit
def integer_noise_kernel(
    weight,
    seed,
    rate,
    scale,
    zero_point,
    out,
    rows,
    cols,
    groups,
    size,
    GROUPED: tl.constexpr,
    LEVELS: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Every element is masked on its own. One program writes `[BLOCK_O, 4 * BLOCK_Q]`."""
    tiles = tl.cdiv(cols, 4 * BLOCK_Q)
    first = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    column = first * 4 * BLOCK_Q + tl.arange(0, 4 * BLOCK_Q)[None, :]
    inside = (row < rows) & (column < cols)
    place = row.to(tl.int64) * cols + column
    value = tl.load(weight + place, mask=inside, other=0.0)
    s, zero = load_grid(scale, zero_point, row, column, rows, cols, groups, size, GROUPED, LEVELS)
    x = value.to(tl.float32)
    if CLAMP:
        low, high = ends_of(s, zero, LEVELS, value.dtype)
        x = tl.clamp(x, low, high, tl.PropagateNan.ALL)
        value = x.to(value.dtype)
    steps = tl.clamp(tl.div_rn(x, s + tl.zeros_like(x)), 0.0 - zero, LEVELS - zero, tl.PropagateNan.ALL)
    steps = (steps + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest whole number, halves to even
    quad = first * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    mask = draw_masks(seed, rate, row, quad, BLOCK_O, BLOCK_Q)
    tl.store(out + place, tl.where(mask, (steps * s).to(value.dtype), value), mask=inside)


@triton.jit
def integer_grad_kernel(
    grad,
    weight,
    scale,
    zero_point,
    out,
    rows,
    cols,
    groups,
    size,
    GROUPED: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient where the weight is within the range, zero elsewhere."""
    tiles = tl.cdiv(cols, BLOCK_C)
    row = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    column = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < cols)
    place = row.to(tl.int64) * cols + column
    value = tl.load(weight + place, mask=inside, other=0.0)
    s, zero = load_grid(scale, zero_point, row, column, rows, cols, groups, size, GROUPED, LEVELS)
    low, high = ends_of(s, zero, LEVELS, value.dtype)
    kept = (value.to(tl.float32) >= low) & (value.to(tl.float32) <= high)
    arriving = tl.load(grad + place, mask=inside, other=0.0)
    tl.store(out + place, tl.where(kept, arriving, tl.zeros_like(arriving)), mask=inside)


def integer_noise(
    weight: Tensor, seed: Tensor, rate: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, clamp: bool
) -> Tensor:
    """Return the weight with some elements on a grid of integers, see `ops.fake_quant_noise`.

    Args:
        weight: `[rows, cols]`, contiguous, float16, bfloat16 or float32.
        seed: int64 `[1]`.
        rate: float32 `[]`.
        scale: float32 `[rows, groups]`, or `[1, 1]`, contiguous.
        zero_point: As `scale`, of any dtype; None is the middle, `2**(bits - 1)`.
        bits: Bits per code.
        clamp: Whether every element is cut to the range first.

    Raises:
        ValueError: A layout or a device does not fit.
        TypeError: A dtype does not fit.
    """
    sizes = _check(integer_noise_kernel, weight, scale, zero_point, seed, rate)
    out = weight.new_empty(weight.shape)
    if out.numel() == 0:
        return out
    (grid, block_o, block_q), grouped = tiles_of(weight.shape[0], weight.shape[1], 1), scale.shape[1] > 1
    with torch.cuda.device_of(weight):
        integer_noise_kernel[grid](
            weight,
            seed,
            rate,
            scale,
            zero_point,
            out,
            *sizes,
            GROUPED=grouped,
            LEVELS=2**bits - 1,
            CLAMP=clamp,
            BLOCK_O=block_o,
            BLOCK_Q=block_q,
            num_warps=4,
        )
    return out


def integer_grad(grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the gradient `[rows, cols]` where the weight is within the range of the integers, and zero elsewhere.

    Args and errors are those of `integer_noise`; `grad` is as `weight`.
    """
    sizes = _check(integer_grad_kernel, weight, scale, zero_point, grad)
    if grad.shape != weight.shape or not grad.is_contiguous():
        raise ValueError(f"the gradient is contiguous {list(weight.shape)}, got {list(grad.shape)}")
    out = grad.new_empty(grad.shape)
    if out.numel() == 0:
        return out
    (grid, block_o, block_q), grouped = tiles_of(weight.shape[0], weight.shape[1], 1), scale.shape[1] > 1
    with torch.cuda.device_of(weight):
        integer_grad_kernel[grid](
            grad,
            weight,
            scale,
            zero_point,
            out,
            *sizes,
            GROUPED=grouped,
            LEVELS=2**bits - 1,
            BLOCK_O=block_o,
            BLOCK_C=4 * block_q,
            num_warps=4,
        )
    return out


def _check(kernel: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *others: Tensor) -> tuple[int, ...]:
    """Check what a kernel reads, and return rows, columns, how far the next row's scales are, and what shares one."""
    check_dtypes(weight)
    check_device(kernel, weight, scale, zero_point, *others)
    check_contiguous(weight=weight, scale=scale, zero_point=zero_point)
    rows, cols = weight.shape
    fits = scale.ndim == 2 and (scale.shape == (1, 1) or (len(scale) == rows and cols % scale.shape[1] == 0))
    if scale.dtype != torch.float32 or not fits:
        got = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"a scale is float32 [{rows}, groups] or [1, 1], and groups divides {cols}; got {got}")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"a zero point is {list(scale.shape)}, as the scale, got {list(zero_point.shape)}")
    return rows, cols, 0 if scale.numel() == 1 else scale.shape[1], cols // scale.shape[1]
