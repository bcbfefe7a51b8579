"""The range that integers cover: what is cut off at its ends costs little where the levels between come closer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_qnoise.ops import affine_steps
from lightning_qnoise.schemes.divergence import least_divergence

Range = Literal["minmax", "ema", "mse", "lsq", "percentile", "histogram"]
_KEPT = 0.9999  # part of the values that "percentile" keeps
_SHRINKS = 48  # ranges that "mse" tries: the whole one down to a quarter of it
_BINS = 2048  # of the histogram of magnitudes


def check_range(name: str) -> None:
    """Raise a ValueError unless `name` is one of the ways to find a range."""
    if name not in get_args(Range):
        raise ValueError(f"range must be one of {', '.join(get_args(Range))}, got {name!r}")


def find_range(
    values: Tensor, bits: int, symmetric: bool, method: str = "minmax", counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the ends of the range that integers of `bits` bits are to cover, widened to hold zero.

    Args:
        values: Float32 `[..., n]`, `n >= 1`; each row has a range of its own.
        bits: Bits per code.
        symmetric: Whether the zero point is fixed in the middle.
        method: `"minmax"` covers all values (`"ema"` too: it averages the ends over batches); `"mse"` has the least
            squared error among 48 shrunken ranges (`"lsq"` starts there); `"percentile"` keeps 99.99 % of the values;
            `"histogram"` has the least Kullback-Leibler divergence, see `least_divergence`. The last two cut
            magnitudes.
        counts: How often each value occurs, float32 of the shape of `values`; None is once.

    Returns:
        Low and high, float32 `[...]`, with `low <= 0 <= high`.

    Example:
        >>> low, high = find_range(torch.tensor([0.0, 1.0, 2.0, -1.0]), bits=8, symmetric=False)
        >>> low.item(), high.item()
        (-1.0, 2.0)
    """
    low, high = values.amin(dim=-1).clamp_(max=0), values.amax(dim=-1).clamp_(min=0)
    if method in ("minmax", "ema"):
        return low, high
    if counts is None:
        counts = torch.ones_like(values)
    if method in ("mse", "lsq"):
        return _least_squares(values, counts, low, high, bits, symmetric)
    threshold = _percentile(values, counts) if method == "percentile" else _divergence(values, counts, bits, symmetric)
    return torch.maximum(low, -threshold), torch.minimum(high, threshold)


def affine_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the integers that cover a range.

    Args:
        low: Float32, at most 0.
        high: Float32 of the same shape, at least 0.
        bits: Bits per code.
        symmetric: Cover `[-m, m]`, `m` the larger magnitude, with the fixed zero point `2**(bits - 1)`.

    Returns:
        Scale, float32, positive, and zero point, float32, whole numbers in `[0, 2**bits)`, of the shape of `low`.
    """
    high, low = high.double(), low.double()
    levels = 2**bits - 1
    span = 2 * torch.maximum(high, -low) * levels / (levels - 1) if symmetric else high - low
    scale = (span / levels).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, (-low.float() / scale).round().clamp(0, levels)


def affine_round(values: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """Return the codes of `values`, float32 whole numbers; what lies outside the range takes the end value.

    See `affine_steps`.

    Example:
        >>> affine_round(torch.tensor([-9.0, 0.0, 1.0, 9.0]), torch.tensor(0.5), torch.tensor(8.0), bits=4)
        tensor([ 0.,  8., 10., 15.])
    """
    return affine_steps(values, scale, zero_point, bits).add_(zero_point)


def affine_decode(codes: Tensor | float, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """Return the values of codes, `(code - zero_point) * scale`."""
    return (codes - zero_point) * scale


def round_trip(values: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """Return `values` on the grid, in their own dtype: their codes, decoded. Without a gradient."""
    found = affine_steps(values, scale, zero_point, bits).mul_(scale)
    return found if values.dtype is torch.float32 else found.to(values.dtype)


def _least_squares(
    values: Tensor, counts: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    best, found = torch.full_like(low, torch.inf), torch.ones_like(low)
    for step in range(_SHRINKS):
        shrink = 1 - step / 64
        scale, zero = (part[..., None] for part in affine_grid(low * shrink, high * shrink, bits, symmetric))
        error = (round_trip(values, scale, zero, bits) - values).square_().mul_(counts).sum(dim=-1)
        found = torch.where(error < best, shrink, found)
        best = torch.minimum(best, error)
    return low * found, high * found


def _percentile(values: Tensor, counts: Tensor) -> Tensor:
    """The magnitude below which nearly all values lie, `[...]`."""
    magnitudes, order = values.abs().sort(dim=-1)
    share = counts.gather(-1, order).cumsum(dim=-1)
    place = (share < _KEPT * share[..., -1:]).sum(dim=-1, keepdim=True)
    return magnitudes.gather(-1, place.clamp(max=values.shape[-1] - 1)).squeeze(-1)


def _divergence(values: Tensor, counts: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The magnitude of least divergence, `[...]`."""
    rows, weights = values.abs().reshape(-1, values.shape[-1]), counts.reshape(-1, values.shape[-1])
    width = rows.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _BINS
    bins = (rows / width).long().clamp_(max=_BINS - 1)
    histogram = rows.new_zeros(len(rows), _BINS).scatter_add_(1, bins, weights)
    n_kept = least_divergence(histogram, n_levels=2 ** (bits - 1))
    is_one_sided = ~((values < 0).any(dim=-1) & (values > 0).any(dim=-1)).reshape(-1)
    if not symmetric and is_one_sided.any():
        n_kept[is_one_sided] = least_divergence(histogram[is_one_sided], n_levels=2**bits)
    return (n_kept * width.squeeze(1)).view(values.shape[:-1])
