"""The nearest centroid of every point."""

from __future__ import annotations

from torch import Tensor

from lightning_qnoise.ops import kmeans_library  # noqa: F401  registers the operator
from lightning_qnoise.ops.library import OPS


def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the nearest centroid of every point, and how far it is.

    Of equally near centroids the first is taken. A NaN is nearest of all, as it is least for `torch.argmin`.

    Args:
        points: Float `[n, d]`, of any dtype; computed with in float32.
        centroids: Float `[k, d]`, `k >= 1`.

    Returns:
        int64 `[n]`, and the squared distances, float32 `[n]`; they round as `|c|^2 - 2 p c + |p|^2` does, and may be
        a little below zero.

    Raises:
        ValueError: A shape or a dtype does not fit.

    Example:
        >>> import torch
        >>> kmeans_assign(torch.tensor([[0.5], [4.0]]), torch.tensor([[0.0], [1.0], [5.0]]))
        (tensor([0, 2]), tensor([0.2500, 1.0000]))
    """
    return OPS.kmeans_assign(points, centroids)
