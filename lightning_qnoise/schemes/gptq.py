"""Rounding in which later columns of a weight make up for the errors of earlier ones (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.schemes.ranges import affine_round

_DAMPING = 0.01  # of the mean diagonal of the moment
_COLUMNS = 64  # updated one by one; all later ones take the update of a whole block at once


def compensated_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, moment: Tensor) -> Tensor:
    """Return codes for which `|| (weight - decoded) X ||` is small, not `|| weight - decoded ||`.

    Columns are rounded in turn, and the error of each is spread over the columns that are still free, by the inverse
    of the moment (Frantar et al. 2023, with the Cholesky factor of section 3.3; ranges are fixed before).

    Args:
        weight: Float32 `[rows, cols]`.
        scale: Float32 `[rows, cols]`, the scale of every element.
        zero_point: Float32 `[rows, cols]`.
        bits: Bits per code.
        moment: Float32 `[cols, cols]`, the mean of `x x^T` over inputs, or `[groups, cols, cols]`, where each of the
            groups has `rows / groups` consecutive rows.

    Returns:
        Float32 `[rows, cols]`, whole numbers in `[0, 2**bits)`.

    Raises:
        ValueError: The moment does not fit the weight, or holds NaN or Inf.
    """
    cols = weight.shape[1]
    if moment.shape[-2:] != (cols, cols) or not torch.isfinite(moment).all():
        raise ValueError(f"the inputs' second moment {list(moment.shape)} does not fit {cols} columns or is not finite")
    moments = moment.view(-1, cols, cols)
    weights, scales, zeros = (part.chunk(len(moments)) for part in (weight, scale, zero_point))
    groups = zip(weights, scales, zeros, moments, strict=True)
    return torch.cat([_codes(w, s, z, bits, _factor(m)) for w, s, z, m in groups])


def _factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, `[cols, cols]`; an input that is always zero is left alone."""
    moment = moment.double()
    diagonal = moment.diagonal()
    damped = moment + torch.diag(torch.where(diagonal > 0, _DAMPING * diagonal.mean(), 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _codes(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, factor: Tensor) -> Tensor:
    free, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight.shape[1])
        errors = torch.empty_like(free[:, start:stop])
        for j in range(start, stop):
            codes[:, j] = affine_round(free[:, j], scale[:, j], zero_point[:, j], bits)
            decoded = (codes[:, j] - zero_point[:, j]) * scale[:, j]
            errors[:, j - start] = (free[:, j] - decoded) / factor[j, j]
            free[:, j:stop] -= errors[:, j - start, None] * factor[j, None, j:stop]
        free[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes
