"""The assignment of k-means: each block's nearest centroid and how far it is, with no `[N, K]` matrix in memory."""

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
    distances,
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
        score = tl.where(score == score, score, float("-inf"))  # as for torch's minima, NaN is the least
        score = tl.where(k[None, :] < n_centroids, score, float("inf"))
        least, at = tl.min(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        closer = least < best
        best = tl.where(closer, least, best)
        code = tl.where(closer, first + at, code)
    distance = tl.where(best == float("-inf"), float("nan"), 2 * best + tl.sum(left * left, axis=1))
    tl.store(codes + n, code.to(tl.int64), mask=n < n_blocks)
    tl.store(distances + n, distance, mask=n < n_blocks)


def pq_assign(blocks: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each block, int64 `[N]`, and the squared distance to it, float32 `[N]`.

    Of equally near ones it is the first. A distance that rounds below zero stays there. The distance to a NaN is NaN
    and the least of all, and to something infinite it is NaN or infinite.

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
    n, d = blocks.shape
    codes, distances = blocks.new_empty(n, dtype=torch.int64), blocks.new_empty(n, dtype=torch.float32)
    if n == 0:
        return codes, distances
    wide = d > 16  # then smaller parts of the products stay in registers
    with torch.cuda.device_of(blocks):
        assign_kernel[(triton.cdiv(n, 128),)](
            blocks,
            centroids,
            codes,
            distances,
            *blocks.stride(),
            n,
            len(centroids),
            D=d,
            WIDTH=max(triton.next_power_of_2(d), 16),  # the least that a dot takes
            BLOCK_N=128,
            BLOCK_K=32 if wide else 64,
            num_warps=8 if wide else 4,
            num_stages=1,
        )
    return codes, distances
