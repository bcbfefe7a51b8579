"""The gradient of a codebook: the sum of the blocks that have one code, in a fixed order and without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import check_device, check_dtypes, n_splits, sum_splits


@triton.jit
def segment_sum_kernel(
    blocks,
    order,
    offsets,
    partial,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum one part of the blocks of one segment."""
    segment = tl.program_id(0)
    part = tl.program_id(1)
    start = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    length = tl.cdiv(end - start, tl.num_programs(1))
    start += part * length
    end = tl.minimum(start + length, end)
    e = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for first in range(start, end, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        block = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
        used = (i < end)[:, None] & (e < D)
        total += tl.load(blocks + block[:, None] * D + e, mask=used, other=0.0).to(tl.float32)
    column = tl.arange(0, WIDTH)
    target = partial + (tl.cast(part, tl.int64) * tl.num_programs(0) + segment) * D + column
    tl.store(target, tl.sum(total, axis=0), mask=column < D)


def segment_sum(blocks: Tensor, order: Tensor, offsets: Tensor, parts: int | None = None) -> Tensor:
    """Return float32 `[n_segments, d]`: row k sums the blocks `order[offsets[k]:offsets[k + 1]]`.

    For the gradient of a codebook the blocks are those of the weight's gradient, and `segments` gives the rest once for
    as long as the codes stay. Divided by `offsets.diff()` the rows are means.

    Args:
        blocks: `[N, d]`, contiguous, float16, bfloat16 or float32.
        order: int32 `[N]`, blocks by segment.
        offsets: int32 `[n_segments + 1]`.
        parts: Parts that each segment is divided into; by default as many as fill the GPU.

    Raises:
        ValueError: A layout or a device does not fit.
        TypeError: A dtype does not fit.
    """
    check_dtypes(blocks)
    if order.dtype != torch.int32 or offsets.dtype != torch.int32:
        raise TypeError(f"order and offsets are int32, got {order.dtype} and {offsets.dtype}")
    if blocks.ndim != 2 or order.shape != blocks.shape[:1] or offsets.ndim != 1 or len(offsets) == 0:
        shapes = f"{list(blocks.shape)}, {list(order.shape)} and {list(offsets.shape)}"
        raise ValueError(f"blocks, order and offsets are [N, d], [N] and [n_segments + 1], got {shapes}")
    if not (blocks.is_contiguous() and order.is_contiguous() and offsets.is_contiguous()):
        raise ValueError("blocks, order and offsets have to be contiguous")
    check_device(segment_sum_kernel, blocks, order, offsets)
    n_segments, d = len(offsets) - 1, blocks.shape[1]
    if n_segments == 0 or d == 0:
        return blocks.new_empty(n_segments, d, dtype=torch.float32)
    width = triton.next_power_of_2(d)
    block_n = max(min(64, 2048 // width), 1)
    parts = parts or n_splits(blocks.device, n_segments, triton.cdiv(len(blocks), n_segments * block_n) or 1, 8)
    partial = blocks.new_empty(parts, n_segments, d, dtype=torch.float32)
    with torch.cuda.device_of(blocks):
        segment_sum_kernel[(n_segments, parts)](
            blocks, order, offsets, partial, D=d, WIDTH=width, BLOCK_N=block_n, num_warps=4
        )
        return sum_splits(partial, torch.float32)
