"""Products with a matrix of packed integers that is decoded a slice of rows at a time.

In half precision a slice is rounded as the whole matrix would be. Otherwise its whole numbers are multiplied, and the
scale meets the products, unless groups of inputs have scales of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qnoise.ops.int_matrix import IntMatrix, row_slices


def linear(x: Tensor, matrix: IntMatrix, bias: Tensor | None = None) -> Tensor:
    """Return `x @ matrix.T + bias`.

    Args:
        x: Float `[rows, n_in]`.
        matrix: Whose products to take.
        bias: Float `[n_out]` or None.

    Returns:
        `[rows, n_out]` in the dtype of `x`, contiguous; as by `F.linear`, of a matrix in that dtype.
    """
    if not x.numel() or not matrix.n_out:
        y = x.new_zeros(len(x), matrix.n_out)
        return y if bias is None else y.copy_(bias)
    dealt, is_scaled = matrix.deal(x), _scales_first(matrix, x.dtype)
    own = bias.to(x.dtype) if bias is not None and is_scaled else None
    slices = row_slices(matrix, x.dtype, is_scaled)
    parts = [F.linear(dealt, values, None if own is None else own[part]) for part, values in slices]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if not is_scaled:
        y *= matrix.scale.t()
        if bias is not None:
            y += bias
    return y


def input_grad(grad: Tensor, matrix: IntMatrix) -> Tensor:
    """Return `grad @ matrix`, `[rows, n_in]` in the dtype of `grad`, for float `[rows, n_out]`."""
    total = grad.new_zeros(len(grad), matrix.n_in, dtype=torch.promote_types(grad.dtype, torch.float32))
    if not grad.numel() or not total.numel():
        return total.to(grad.dtype)
    is_scaled = _scales_first(matrix, grad.dtype)
    scaled = grad if is_scaled else grad * matrix.scale.t()
    for part, values in row_slices(matrix, grad.dtype, is_scaled, factor=max(1, min(8, len(grad) // 64))):
        if grad.dtype == total.dtype:
            total.addmm_(scaled[:, part], values)
        else:
            total += scaled[:, part] @ values
    return matrix.gather(total.to(grad.dtype))


def _scales_first(matrix: IntMatrix, dtype: torch.dtype) -> bool:
    """Whether the matrix is scaled, and not its product: with groups, and where whole numbers could overflow."""
    return matrix.scale.shape[1] > 1 or dtype in (torch.float16, torch.bfloat16)
