"""Products in integers: `y = sx * sw * sum((qx - zx) * (qw - zw)) + bias`, the sum in 32 bits.

The weight stays in one byte an element and no float copy of it is made. The product of the codes is exact; its
conversion to float32 and the corrections by the zero points round as float32 does. Nothing here has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops import cublas, onednn
from lightning_qnoise.ops.int8_codes import byte_codes
from lightning_qnoise.ops.int8_grid import Int8Grid
from lightning_qnoise.ops.int8_weight import Int8Weight

_BLOCK = 2**20  # elements of a temporary, 4 MiB; malloc keeps its pages


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, grid: Int8Grid) -> Tensor:
    """Quantize `x`, multiply by the weight in integers and return the product in the dtype of `x`.

    Args:
        x: Float `[..., in]`; it counts as `affine_steps(x, scale, zero_point, bits) * scale` of the grid.
        weight: From `prepare_int8`.
        bias: Float `[out]` or None.
        grid: From `prepare_grid`, for this weight; one scale, or one per row of `x`.

    Returns:
        `[..., out]`, without a gradient.

    Raises:
        ValueError: `x` or its grid does not fit.

    Example:
        >>> from lightning_qnoise.ops import prepare_grid, prepare_int8
        >>> weight = prepare_int8(torch.tensor([[130, 126]]), torch.tensor([0.5]), None)
        >>> int8_linear(torch.tensor([[3.0, 1.0]]), weight, None, prepare_grid(weight, torch.tensor(1.0), 0))
        tensor([[2.]])
    """
    n_out, n_in = weight.shape
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()  # `_int_mm` mistakes other strides, even of a single row
    if x.shape[-1] != n_in or (grid.scale.ndim and len(grid.scale) != len(rows)):
        shapes = f"input {list(x.shape)} and {grid.scale.numel()} scales"
        raise ValueError(f"int8_linear expects an input [..., {n_in}] and one scale, or one per row, got {shapes}")
    if not rows.numel():
        return x.new_zeros(*x.shape[:-1], n_out)
    bias = None if bias is None else bias.detach()
    if len(rows) * max(n_in, n_out) <= _BLOCK or not x.is_cpu:
        y = _product(rows, weight, bias, grid)
    else:
        y = _product_of_slices(rows, weight, bias, grid)
    y = y if y.dtype is x.dtype else y.to(x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], n_out)


def _product_of_slices(rows: Tensor, weight: Int8Weight, bias: Tensor | None, grid: Int8Grid) -> Tensor:
    """Return `rows @ W.T + bias`, float32, a slice of rows at a time."""
    size = max(16, _BLOCK * torch.get_num_threads() // max(weight.shape))
    if len(rows) <= size or (isinstance(weight.matrix, onednn.Packed) and grid.factor is not None):
        return _product(rows, weight, bias, grid)
    y = torch.empty(len(rows), weight.shape[0], dtype=torch.float32, device="cpu")
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        _product(rows[part], weight, bias, grid.rows(part), out=y[part])
    return y


def _product(
    rows: Tensor, weight: Int8Weight, bias: Tensor | None, grid: Int8Grid, out: Tensor | None = None
) -> Tensor:
    """Return `rows @ W.T + bias`, float32, or write it; every pass shows in the time, and new memory more.

    With whole numbers, `sum((qx - zx) * (qw - zw)) = sum(qx * qw) - zw * sum(qx) - zx * sum(qw - zw)`.
    """
    codes = byte_codes(rows, grid.scale, grid.offset, grid.bits, 2 ** (grid.bits - 1))
    sums = None if weight.zero_point is None else _sums(codes)
    if grid.factor is None or grid.shift is None:
        y = _minus(_sums_of_products(codes, weight, out), sums, weight.zero_point)
        y = _minus(y, grid.offset, weight.sums).mul_(weight.scale)
        return y.mul_(grid.scale) if bias is None else torch.addcmul(bias, y, grid.scale, out=y)
    shift = grid.shift if bias is None else grid.shift + bias
    if isinstance(weight.matrix, onednn.Packed):
        y = onednn.linear(codes, weight.matrix, grid.factor, shift)
        return _minus(y, sums, None if weight.zero_point is None else weight.zero_point * grid.factor)
    y = _minus(_sums_of_products(codes, weight, out), sums, weight.zero_point)
    return torch.addcmul(shift, y, grid.factor, out=y)


def _sums_of_products(codes: Tensor, weight: Int8Weight, out: Tensor | None) -> Tensor:
    """Return `sum(qx * qw)`, float32 `[rows, out]`, or write it."""
    matrix = weight.matrix
    if not isinstance(matrix, Tensor):
        y = onednn.linear(codes, matrix) if isinstance(matrix, onednn.Packed) else cublas.linear(codes, matrix)
        return y if out is None else out.copy_(y)
    product = torch._int_mm(codes, matrix) if out is None else torch._int_mm(codes, matrix, out=out.view(torch.int32))
    return product.view(torch.float32).copy_(product)  # in its own memory


def _sums(codes: Tensor) -> Tensor:
    """Return the sums of rows, float32 `[rows, 1]`."""
    if not codes.is_cpu:
        return codes.sum(dim=1, keepdim=True, dtype=torch.float32)
    return torch._int_mm(codes, codes.new_ones(codes.shape[1], 1)).float()  # three times as fast


def _minus(y: Tensor, rows: Tensor | int | None, columns: Tensor | None) -> Tensor:
    """Take an outer product off a matrix, in place; None is zero."""
    if columns is None or rows is None:
        return y
    if isinstance(rows, int):
        return y.sub_(columns, alpha=rows) if rows else y
    return y.addcmul_(rows, columns, value=-1)
