"""Lloyd's k-means in fp32 by matrix products: exact distances, chunked by memory, the same result for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20  # distances held at once: 4 MiB, which stays in a CPU core's cache


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid of every point (ties go to the lowest index).

    Args:
        points: Float `[n, d]`.
        centroids: Float32 `[k, d]`.

    Returns:
        int64 `[n]`.

    Example:
        >>> nearest(torch.tensor([[0.1], [0.9]]), torch.tensor([[0.0], [1.0]]))
        tensor([0, 1])
    """
    return _assign(points.float(), centroids)[0]


def kmeans(points: Tensor, k: int, *, n_iter: int = 20, seed: int = 0, init: Tensor | None = None) -> Tensor:
    """Cluster points so that the squared distance to the nearest centroid is small (Lloyd's algorithm).

    Every iteration lowers the objective or leaves it: a cluster that loses all its points is seeded again with the
    point that lies farthest from all centroids. Work is done in fp32 whatever the dtype of the points.

    Args:
        points: Float `[n, d]`, finite.
        k: Number of centroids wanted.
        n_iter: Most iterations; fewer where the assignment stops changing.
        seed: Seed of the first choice of centroids. The global random state is not used.
        init: Float `[k, d]` centroids to start from instead of `k` points drawn by `seed`.

    Returns:
        float32 `[min(k, distinct points), d]`. With at most `k` distinct points these are the points themselves.

    Raises:
        ValueError: `points` is not `[n, d]` with `n > 0`, holds NaN, Inf or values whose squares overflow, `k < 1`, or
            `init` has another width.

    Example:
        >>> kmeans(torch.tensor([[0.0], [0.1], [5.0]]), k=2).sort(dim=0).values
        tensor([[0.0500],
                [5.0000]])
    """
    _check(points, k, init)
    points = points.detach().float().contiguous()
    distinct = _distinct(points, k)
    if distinct is not None:
        return distinct
    if init is None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(points), generator=generator)[:k]
        centroids = points[chosen.to(points.device)]
    else:
        centroids = init.detach().to(points)[:k].clone()
    codes, distance = _assign(points, centroids)
    for _ in range(n_iter):
        centroids = _update(points, codes, distance, len(centroids))
        previous = codes
        codes, distance = _assign(points, centroids)
        if torch.equal(codes, previous):
            break
    return centroids


def _check(points: Tensor, k: int, init: Tensor | None) -> None:
    if points.ndim != 2 or not len(points):
        raise ValueError(f"k-means expects points of shape [n, d] with n > 0, got {list(points.shape)}")
    if k < 1:
        raise ValueError(f"k-means expects k >= 1, got {k}")
    if init is not None and (init.ndim != 2 or init.shape[1] != points.shape[1]):
        raise ValueError(f"k-means expects init of shape [k, {points.shape[1]}], got {list(init.shape)}")
    if not torch.isfinite(points.float().square().sum(dim=1)).all():
        raise ValueError("k-means expects finite points, got NaN, Inf or values too large to square in fp32")


def _distinct(points: Tensor, k: int) -> Tensor | None:
    """The distinct points where there are at most `k` of them: a hash of their bits counts them in one sort."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, points.shape[1:], generator=generator).to(points.device)
    bits = (points + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    if len(torch.unique((bits * factors).sum(dim=1))) > k:
        return None
    distinct = torch.unique(points, dim=0)
    return distinct if len(distinct) <= k else None


def _assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid int64 `[n]` and the squared distance to it `[n]`."""
    codes = torch.empty(len(points), dtype=torch.int64, device=points.device)
    distance = torch.empty(len(points), dtype=torch.float32, device=points.device)
    norms = centroids.square().sum(dim=1)
    step = max(1, _CHUNK_ELEMENTS // len(centroids))
    with torch.autocast(points.device.type, enabled=False):
        for start in range(0, len(points), step):
            chunk = points[start : start + step]
            least, index = torch.addmm(norms, chunk, centroids.T, alpha=-2).min(dim=1)
            codes[start : start + step] = index
            distance[start : start + step] = least + chunk.square().sum(dim=1)
    return codes, distance


def _update(points: Tensor, codes: Tensor, distance: Tensor, k: int) -> Tensor:
    """Mean of every cluster; an empty one moves to the point that is farthest from all centroids."""
    counts = torch.bincount(codes, minlength=k)
    sums = points.new_zeros(k, points.shape[1]).index_add_(0, codes, points)
    centroids = sums / counts.clamp(min=1)[:, None]
    for cluster in (counts == 0).nonzero().flatten().tolist():
        centroids[cluster] = points[distance.argmax()]
        distance = torch.minimum(distance, (points - centroids[cluster]).square().sum(dim=1))
    return centroids
