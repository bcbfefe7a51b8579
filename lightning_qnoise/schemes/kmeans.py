"""Lloyd's k-means in fp32 by matrix products: exact distances, chunked by memory, the same result for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops import kmeans_assign

_SAMPLE, _TRIES, _SEED_ITER = 128, 4, 10  # seeding: points per centroid looked at, most draws, iterations of each


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
    return kmeans_assign(points.detach(), centroids.detach())[0]


def kmeans(points: Tensor, k: int, *, n_iter: int = 20, seed: int = 0, init: Tensor | None = None) -> Tensor:
    """Cluster points so that the squared distance to the nearest centroid is small (Lloyd's algorithm).

    Every iteration lowers the objective or leaves it: a cluster that loses all its points is seeded again with the
    point that lies farthest from all centroids. Work is done in fp32 whatever the dtype of the points.

    The seeding draws points in proportion to their norm, which serves heavy tails, and iterates on a sample; where the
    points are few, the best of several draws is taken.

    Args:
        points: Float `[n, d]`, finite.
        k: Number of centroids wanted.
        n_iter: Most iterations; fewer where the assignment stops changing. The seeding stands for a sixth of them.
        seed: Seed of the first centroids. The global random state is not used.
        init: Float `[k, d]` centroids to start from instead.

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
        return _lloyd(points, _seed(points, k, seed), n_iter - n_iter // 6)[0]
    return _lloyd(points, init.detach().to(points)[:k].clone(), n_iter)[0]


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
    if len(points) > 8 * k and _distinct(points[: 4 * k], k) is None:
        return None
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, points.shape[1:], generator=generator, device=generator.device).to(
        points.device
    )
    if len(torch.unique(((points + 0.0).view(torch.int32) * factors).sum(dim=1))) > k:  # -0.0 becomes 0.0
        return None
    return distinct if len(distinct := torch.unique(points, dim=0)) <= k else None


def _seed(points: Tensor, k: int, seed: int) -> Tensor:
    """First centroids `[k, d]`: the best of a few draws, each improved on a sample of the points."""
    generator = torch.Generator().manual_seed(seed)
    tries = min(_TRIES, max(1, _SAMPLE * k // len(points)))
    if len(points) > _SAMPLE * k:
        shuffled = torch.randperm(len(points), generator=generator, device=generator.device)
        points = points[shuffled[: _SAMPLE * k].to(points.device)]
    found = [_lloyd(points, _draw(points, k, generator), _SEED_ITER) for _ in range(tries)]
    return min(found, key=lambda result: result[1])[0]


def _draw(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Points `[k, d]` drawn without replacement in proportion to their norm: the first of exponential arrivals."""
    uniform = torch.rand(len(points), generator=generator, dtype=torch.float32, device=generator.device).to(
        points.device
    )
    return points[(-uniform.log() / points.norm(dim=1)).topk(k, largest=False).indices]


def _lloyd(points: Tensor, centroids: Tensor, n_iter: int) -> tuple[Tensor, float]:
    """Centroids after at most `n_iter` iterations, and the objective before the last."""
    codes, objective = torch.empty(0, dtype=torch.int64, device=centroids.device), torch.inf
    for _ in range(n_iter):
        previous, (codes, distance) = codes, kmeans_assign(points, centroids)
        objective = distance.sum().item()
        if torch.equal(codes, previous):
            break
        centroids = _update(points, codes, distance, len(centroids))
    return centroids, objective


def _update(points: Tensor, codes: Tensor, distance: Tensor, k: int) -> Tensor:
    """Mean of every cluster; an empty one moves to the point that is farthest from all centroids."""
    counts = torch.bincount(codes, minlength=k)
    centroids = points.new_zeros(k, points.shape[1]).index_add_(0, codes, points) / counts.clamp(min=1)[:, None]
    for cluster in (counts == 0).nonzero().flatten().tolist():
        centroids[cluster] = points[distance.argmax()]
        distance = torch.minimum(distance, (points - centroids[cluster]).square().sum(dim=1))
    return centroids
