"""Linear layers in integers: `y = sx * sw * sum((qx - zx) * (qw - zw)) + bias`, the sum by `torch._int_mm`.

The weight stays in one byte an element and no float copy of it is made. The product of the codes is exact in 32 bits;
its conversion to float32 and the corrections by the zero points round as float32 does. Nothing here has a gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_IN = 2**31 // 2**14 - 1  # the largest sum of products of two signed bytes that fits in an int32
_BLOCK = 2**18  # elements of a temporary, 1 MiB: it stays in the cache, and malloc keeps its pages


class Int8Weight(NamedTuple):
    """The matrix of a Linear layer, ready for `int8_linear`.

    Attributes:
        matrix: int8 `[in, out]`, contiguous: the codes less `2**(bits - 1)`.
        scale: float32 `[out]`.
        sums: float32 `[out]`, whole numbers: `code - zero_point` summed over `in`.
        zero_point: float32 `[out]`, whole numbers: the zero points less `2**(bits - 1)`; None if all are zero.
    """

    matrix: Tensor
    scale: Tensor
    sums: Tensor
    zero_point: Tensor | None

    def to(self, device: torch.device | str) -> Int8Weight:
        """Return the weight on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return Int8Weight(self.matrix.to(device), self.scale.to(device), self.sums.to(device), zero_point)


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


def prepare_int8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8) -> Int8Weight:
    """Lay out a quantized matrix, `(codes - zero_point) * scale`, for `int8_linear`.

    Args:
        codes: Integers `[out, in]` in `[0, 2**bits)`, of any integer dtype.
        scale: Float32, one per row or one in all.
        zero_point: Integers, one per row or one in all; None stands for `2**(bits - 1)`, which is the fastest.
        bits: Bits per code, at most 8.

    Raises:
        ValueError: A row is too long for sums in 32 bits, or has several scales.

    Example:
        >>> prepare_int8(torch.tensor([[0, 128, 255]]), torch.ones(1, 1), None).matrix.tolist()
        [[-128], [0], [127]]
    """
    n_out, n_in = codes.shape
    if n_in > _MAX_IN:
        raise ValueError(f"int8 sums of {n_in} products overflow 32 bits; at most {_MAX_IN} inputs are possible")
    if scale.numel() not in (1, n_out):
        raise ValueError(f"int8 execution needs one scale per row, got {scale.numel()} scales for {n_out} rows")
    middle = 2 ** (bits - 1)
    matrix = (codes.short() - middle).to(torch.int8)
    sums = matrix.sum(dim=1, dtype=torch.int32)
    if zero_point is not None:
        zero_point = (zero_point.int() - middle).reshape(-1).expand(n_out)
        sums = sums - n_in * zero_point
        zero_point = zero_point.float() if zero_point.any() else None
    matrix = matrix.t().clone(memory_format=torch.contiguous_format)  # strides that `_int_mm` takes for one row, too
    return Int8Weight(matrix, scale.float().reshape(-1).expand(n_out), sums.float(), zero_point)


def int8_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, x_scale: Tensor, x_zero_point: Tensor, x_bits: int = 8
) -> Tensor:
    """Quantize `x`, multiply by the weight in integers and return the product in the dtype of `x`.

    `x` counts as `(clamp(round(x / x_scale + x_zero_point), 0, 2**x_bits - 1) - x_zero_point) * x_scale`.

    Args:
        x: Float `[..., in]`.
        weight: From `prepare_int8`.
        bias: Float `[out]` or None.
        x_scale: Float32, `[]` for all of `x` or `[..., 1]` per token.
        x_zero_point: Float32 whole numbers in `[0, 2**x_bits)`, of the shape of `x_scale`.
        x_bits: Bits per code of `x`, at most 8.

    Returns:
        `[..., out]`, without a gradient.

    Raises:
        ValueError: `x` or its grid does not fit.

    Example:
        >>> weight = prepare_int8(torch.tensor([[130, 126]]), torch.tensor([0.5]), None)
        >>> int8_linear(torch.tensor([[3.0, 1.0]]), weight, None, torch.tensor(1.0), torch.tensor(0.0))
        tensor([[2.]])
    """
    n_in, n_out = weight.matrix.shape
    rows = x.detach().reshape(-1, x.shape[-1])
    if x.shape[-1] != n_in or (x_scale.ndim and x_scale.numel() != len(rows)) or x_scale.shape != x_zero_point.shape:
        shapes = f"input {list(x.shape)}, grid {list(x_scale.shape)} and {list(x_zero_point.shape)}"
        raise ValueError(f"int8_linear expects an input [..., {n_in}] and a grid [] or [..., 1], got {shapes}")
    bias = None if bias is None else bias.detach().float()
    if x_scale.ndim:
        x_scale, x_zero_point = x_scale.reshape(-1, 1), x_zero_point.reshape(-1, 1)
    size = max(16, _BLOCK * torch.get_num_threads() // max(n_in, n_out))
    if x.is_cuda or len(rows) <= size:
        y = _linear_rows(rows, weight, bias, x_scale, x_zero_point, x_bits).to(x.dtype)
    else:
        y = x.new_empty(len(rows), n_out)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            grid = (x_scale[part], x_zero_point[part]) if x_scale.ndim else (x_scale, x_zero_point)
            _linear_rows(rows[part], weight, bias, *grid, x_bits, out=y[part])
    return y.view(*x.shape[:-1], n_out)


def _linear_rows(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    out: Tensor | None = None,
) -> Tensor:
    """Float `[rows, out]` for `x [rows, in]`; on a CPU every pass over a matrix shows in the time.

    With whole numbers, `sum((qx - zx) * (qw - zw)) = sum(qx * qw) - zw * sum(qx) - zx * sum(qw - zw)`.
    """
    middle = 2 ** (bits - 1)
    codes = (x.float() / scale).add_(zero_point).round_().clamp_(0, 2**bits - 1).sub_(middle)
    zero_point = zero_point - middle
    product = _int_mm(codes.to(torch.int8, memory_format=torch.contiguous_format), weight.matrix)
    y = product.view(torch.float32).copy_(product)  # in its own memory
    if weight.zero_point is not None:
        y.addcmul_(codes.sum(dim=1, keepdim=True), weight.zero_point, value=-1)
    if scale.ndim:
        y.addcmul_(zero_point, weight.sums, value=-1).mul_(weight.scale)
        return torch.mul(y, scale, out=out) if bias is None else torch.addcmul(bias, y, scale, out=out)
    factor = scale * weight.scale
    shift = weight.sums * zero_point * factor
    return torch.addcmul(-shift if bias is None else bias - shift, y, factor, out=out)


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
