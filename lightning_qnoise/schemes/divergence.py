"""Where to cut a histogram so that few levels tell most of it: the entropy calibration of static quantization."""

from __future__ import annotations

import torch
from torch import Tensor

_START, _STRIDE = 128, 16  # bins of the narrowest range, and between two that are tried


def least_divergence(histogram: Tensor, n_levels: int, fix_zero_bin: bool = True) -> Tensor:
    """Return how many bins to keep so that `n_levels` levels lose the least information (Migacz 2017).

    The kept histogram P takes all counts that are cut off into its last bin. Q has the counts of the kept bins alone,
    summed over each level and spread evenly over the bins of the level that are not empty. Kept is the number of bins
    with the least Kullback-Leibler divergence of Q from P; of equal ones the most bins.

    Args:
        histogram: Counts of magnitudes, float32 `[rows, bins]`, `bins > n_levels`, from zero up in equal steps.
        n_levels: Levels between zero and the end of the range.
        fix_zero_bin: Give the bin of zeros the count of the next one. A ReLU fills it with exact zeros, which every
            range holds exactly, and which would outweigh everything else.

    Returns:
        Float32 `[rows]`, the number of bins, from `max(128, n_levels)` to all.

    Example:
        >>> counts = (1000 * torch.exp(-((torch.arange(2048) / 150.0) ** 2))).round()[None]
        >>> counts[0, -1] = 1.0  # an outlier
        >>> least_divergence(counts, n_levels=8)
        tensor([368.])
    """
    counts = histogram.clone()
    if fix_zero_bin:
        counts[:, 0] = counts[:, 1]
    n_bins = counts.shape[1]
    start = max(_START, n_levels)
    best = counts.new_full((len(counts),), torch.inf)
    kept = counts.new_full((len(counts),), n_bins)
    for size in sorted({*range(start, n_bins, _STRIDE), n_bins}):
        divergence = _divergence(counts, size, n_levels)
        kept = torch.where(divergence <= best, float(size), kept)
        best = torch.minimum(best, divergence)
    return kept


def _divergence(counts: Tensor, size: int, n_levels: int) -> Tensor:
    """Divergence of the histogram of `n_levels` levels on the first `size` bins, `[rows]`."""
    p = counts[:, :size].clone()
    level = torch.arange(size, device=p.device) * n_levels // size
    filled = (p > 0).float()
    sums = p.new_zeros(len(p), n_levels).index_add_(1, level, p)
    shares = sums / p.new_zeros(len(p), n_levels).index_add_(1, level, filled).clamp_(min=1)
    q = shares[:, level] * filled
    p[:, -1] += counts[:, size:].sum(dim=1)
    p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(dim=1)
