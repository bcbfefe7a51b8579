"""Registers `kmeans_assign`, which has no gradient.

Distances come from matrix products in float32, a chunk of points at a time: no matrix of all points and centroids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_qnoise.ops.library import register

_CHUNK_ELEMENTS = 1 << 18  # distances held at once: 1 MiB, which stays in a CPU core's L2 cache
_CHUNK_FACTOR = 256  # on other devices, which want few, large products
_KERNEL_WIDTH = 64  # the most columns that the kernel takes


def _check(points: Tensor, centroids: Tensor) -> None:
    if points.ndim != 2 or centroids.ndim != 2 or points.shape[1] != centroids.shape[1] or not len(centroids):
        shapes = f"{list(points.shape)} and {list(centroids.shape)}"
        raise ValueError(f"expected points [n, d] and centroids [k, d] with k >= 1, got {shapes}")
    if not (points.is_floating_point() and centroids.is_floating_point()):
        raise ValueError(f"expected floats, got {points.dtype} and {centroids.dtype}")


def _least_cpu(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and index `[n]` of every row, the index outside `[0, k)` where several are least; overwrites `cost`.

    `min` takes ten times as long as the vectorised `amin`. So a comparison marks the minima, and a product with
    `k + index` reads the marks: two of them add up to more than `2k`.
    """
    k, least = cost.shape[1], cost.amin(dim=1, keepdim=True)
    codes = torch.mv(cost.eq_(least), torch.arange(k, 2 * k, dtype=torch.float32, device=cost.device))
    return least[:, 0], codes.long() - k


def _assign(
    points: Tensor, centroids: Tensor, chunk: int, least_of: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    _check(points, centroids)
    points, centroids = points.float(), centroids.float()
    offset, projection = centroids.square().sum(dim=1), -2 * centroids.T
    n, k = len(points), len(centroids)
    codes, least = points.new_empty(n, dtype=torch.int64), points.new_empty(n)
    step = max(64, chunk // k)
    buffer = least.new_empty(min(step, n), k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        cost = torch.addmm(offset, points[rows], projection, out=buffer[: n - start])
        least[rows], codes[rows] = least_of(cost)
    for rest in ((codes < 0) | (codes >= k)).nonzero().flatten().split(step):
        codes[rest] = torch.addmm(offset, points[rest], projection).argmin(dim=1)
    return codes, least + points.square().sum(dim=1)


def _reference(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return _assign(points, centroids, _CHUNK_ELEMENTS * _CHUNK_FACTOR, lambda cost: cost.min(dim=1))


def _cpu(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return _assign(points, centroids, _CHUNK_ELEMENTS, _least_cpu)


def _cuda(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    _check(points, centroids)
    if not 0 < points.shape[1] <= _KERNEL_WIDTH:
        return _reference(points, centroids)
    from lightning_qnoise.kernels.assign import pq_assign

    points = points.float() if points.dtype == torch.float64 else points
    return pq_assign(points, centroids.float().contiguous())


def _fake(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    _check(points, centroids)
    return points.new_empty(len(points), dtype=torch.int64), points.new_empty(len(points), dtype=torch.float32)


register("kmeans_assign(Tensor points, Tensor centroids) -> (Tensor, Tensor)", _reference, _fake, cpu=_cpu, cuda=_cuda)
