"""Products in integers: `y = sx * sw * sum((qx - zx) * (qw - zw)) + bias`, the sum by `torch._int_mm`.

The weight stays in one byte an element and no float copy of it is made. The product of the codes is exact in 32 bits;
its conversion to float32 and the corrections by the zero points round as float32 does. Nothing here has a gradient.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qnoise.ops.int8_grid import Int8Grid
from lightning_qnoise.ops.int8_weight import Int8Weight

_BLOCK = 2**18  # elements of a temporary, 1 MiB: it stays in the cache, and malloc keeps its pages


@lru_cache
def has_int8(device_type: str) -> bool:
    """Whether `torch._int_mm` runs on this kind of device and is exact there.

    On a processor without VNNI instructions it saturates in 16 bits and returns wrong sums.

    Args:
        device_type: `"cpu"`, `"cuda"`, ...
    """
    codes = torch.full((32, 64), 127, dtype=torch.int8, device=device_type)
    try:
        return bool((torch._int_mm(codes, codes.t().contiguous()) == 64 * 127**2).all())
    except RuntimeError:  # not implemented
        return False


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, grid: Int8Grid) -> Tensor:
    """Quantize `x`, multiply by the weight in integers and return the product in the dtype of `x`.

    `x` counts as `(clamp(round(x / scale + zero_point), 0, 2**bits - 1) - zero_point) * scale` of the grid.

    Args:
        x: Float `[..., in]`.
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
        >>> grid = prepare_grid(weight, torch.tensor(1.0), torch.tensor(0.0))
        >>> int8_linear(torch.tensor([[3.0, 1.0]]), weight, None, grid)
        tensor([[2.]])
    """
    n_in, n_out = weight.matrix.shape
    rows = x.detach().reshape(-1, x.shape[-1])
    if x.shape[-1] != n_in or (grid.scale.ndim and len(grid.scale) != len(rows)):
        shapes = f"input {list(x.shape)} and {grid.scale.numel()} scales"
        raise ValueError(f"int8_linear expects an input [..., {n_in}] and one scale, or one per row, got {shapes}")
    bias = None if bias is None else bias.detach().float()
    size = max(16, _BLOCK * torch.get_num_threads() // max(n_in, n_out))
    if x.is_cuda or len(rows) <= size:
        y = int8_product(int8_codes(rows, grid), weight, bias, grid).to(x.dtype)
    else:
        y = x.new_empty(len(rows), n_out)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            own = grid.rows(part)
            int8_product(int8_codes(rows[part], own), weight, bias, own, out=y[part])
    return y.view(*x.shape[:-1], n_out)


def shifted_codes(x: Tensor, grid: Int8Grid) -> Tensor:
    """Return the codes of `x` less `2**(bits - 1)`: float32 whole numbers, in the layout of `x`.

    Example:
        >>> from lightning_qnoise.ops import prepare_grid, prepare_int8
        >>> weight = prepare_int8(torch.tensor([[130]]), torch.ones(1), None)
        >>> shifted_codes(torch.tensor([-1.0, 0.4, 9.0]), prepare_grid(weight, torch.tensor(1.0), torch.tensor(3.0), 3))
        tensor([-2., -1.,  3.])
    """
    return (x.float() / grid.scale).add_(grid.zero_point).round_().clamp_(0, 2**grid.bits - 1).sub_(grid.middle)


def int8_codes(x: Tensor, grid: Int8Grid) -> Tensor:
    """Return the codes of `x`, int8 and contiguous; see `shifted_codes`."""
    return shifted_codes(x, grid).to(torch.int8, memory_format=torch.contiguous_format)


def int8_product(
    codes: Tensor, weight: Int8Weight, bias: Tensor | None, grid: Int8Grid, out: Tensor | None = None
) -> Tensor:
    """Return `x @ W.T + bias` for the codes of `x`; on a CPU every pass over a matrix shows in the time.

    With whole numbers, `sum((qx - zx) * (qw - zw)) = sum(qx * qw) - zw * sum(qx) - zx * sum(qw - zw)`.

    Args:
        codes: int8 `[rows, in]`, contiguous; see `int8_codes`.
        weight: From `prepare_int8`.
        bias: float32 `[out]` or None.
        grid: From `prepare_grid`; one scale, or one per row.
        out: Float `[rows, out]` to write to, of any strides; `[..., out]` of as many rows, if the grid has a factor.

    Returns:
        `[rows, out]`, or `out`; float32 unless `out` has another dtype.

    Example:
        >>> from lightning_qnoise.ops import prepare_grid, prepare_int8
        >>> weight = prepare_int8(torch.tensor([[130, 126]]), torch.tensor([0.5]), None)
        >>> grid = prepare_grid(weight, torch.tensor(1.0), torch.tensor(128.0))
        >>> int8_product(torch.tensor([[3, 1]], dtype=torch.int8), weight, None, grid)
        tensor([[2.]])
    """
    product = _int_mm(codes, weight.matrix)
    y = product.view(torch.float32).copy_(product)  # in its own memory
    if weight.zero_point is not None:
        y.addcmul_(_int_mm(codes, codes.new_ones(codes.shape[1], 1)).float(), weight.zero_point, value=-1)
    if grid.factor is not None and grid.shift is not None:
        y = y if out is None else y.view(out.shape)
        return torch.addcmul(grid.shift if bias is None else grid.shift + bias, y, grid.factor, out=out)
    y.addcmul_(grid.offset, weight.sums, value=-1).mul_(weight.scale)
    return torch.mul(y, grid.scale, out=out) if bias is None else torch.addcmul(bias, y, grid.scale, out=out)


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    """int32 `[m, n]` of int8 `[m, k]` and `[k, n]`; cuBLAS wants 17 rows at least, and multiples of 8 elsewhere."""
    if not left.is_cuda:
        return torch._int_mm(left, right)
    (m, k), n = left.shape, right.shape[1]
    if m < 17 or k % 8:
        left = F.pad(left, (0, -k % 8, 0, max(0, 17 - m)))
    if k % 8 or n % 8:
        right = F.pad(right, (0, -n % 8, 0, -k % 8))
    return torch._int_mm(left, right)[:m, :n]
