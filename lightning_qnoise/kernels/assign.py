"""The assignment of k-means: the nearest centroid of each block, with no `[N, K]` matrix in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import check_device, check_dtypes


@triton.jit
def assign_kernel(
    blocks,
    centroids,
    codes,
    stride_n,
    stride_d,
    n_blocks,
    n_centroids,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keep the least `|c|^2 / 2 - b . c` of each block over tiles of BLOCK_K centroids, the first of equals."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, WIDTH)
    source = blocks + n[:, None] * stride_n + e[None, :] * stride_d
    left = tl.load(source, mask=(n[:, None] < n_blocks) & (e[None, :] < D), other=0.0).to(tl.float32)
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    code = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, n_centroids, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (k[None, :] < n_centroids) & (e[:, None] < D)
        right = tl.load(centroids + k[None, :] * D + e[:, None], mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(right * right, axis=0)[None, :] * 0.5 - tl.dot(left, right, input_precision="ieee")
        # a centroid that is NaN is never the nearest
        score = tl.where((k[None, :] < n_centroids) & (score == score), score, float("inf"))
        least, at = tl.min(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        closer = least < best
        best = tl.where(closer, least, best)
        code = tl.where(closer, first + at, code)
    tl.store(codes + n, code, mask=n < n_blocks)


def pq_assign(blocks: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each block, int32 `[N]`; of equally near ones, the first.

    The distances are in float32. A block that is NaN or infinite gets some valid index.

    Args:
        blocks: `[N, d]`, of any strides, float16, bfloat16 or float32; d is 64 at most.
        centroids: `[K, d]`, contiguous, of any of these dtypes.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
    """
    check_dtypes(blocks, centroids)
    matrices = blocks.ndim == centroids.ndim == 2
    if not matrices or blocks.shape[1] != centroids.shape[1] or not 0 < blocks.shape[1] <= 64:
        shapes = f"{list(blocks.shape)} and {list(centroids.shape)}"
        raise ValueError(f"blocks and centroids are [N, d] and [K, d] with d from 1 to 64, got {shapes}")
    if len(centroids) == 0 or not centroids.is_contiguous():
        raise ValueError(f"the centroids have to be contiguous and not none, got {list(centroids.shape)}")
    check_device(assign_kernel, blocks, centroids)
    codes = blocks.new_empty(len(blocks), dtype=torch.int32)
    if len(blocks) == 0:
        return codes
    with torch.cuda.device_of(blocks):
        assign_kernel[(triton.cdiv(len(blocks), 128),)](
            blocks,
            centroids,
            codes,
            *blocks.stride(),
            len(blocks),
            len(centroids),
            D=blocks.shape[1],
            WIDTH=max(triton.next_power_of_2(blocks.shape[1]), 16),  # the least that a dot takes
            BLOCK_N=128,
            BLOCK_K=64,
            num_warps=4,
            num_stages=1,
        )
    return codes
