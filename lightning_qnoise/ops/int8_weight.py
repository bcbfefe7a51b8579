"""The weight of integer products."""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_qnoise.ops import cublas, onednn

_MAX_IN = 2**31 // (255 * 128) - 1  # the largest sum of products of a byte and a signed one that fits in an int32
_LEAST_ONEDNN = 2**19  # elements of a matrix: oneDNN's kernels reorder no weight in a call, but take 30 us to start
_X86 = ("x86_64", "AMD64")
Backend = Literal["onednn", "cublas", "int_mm"]


@lru_cache
def int8_backend(device_type: str) -> Backend | None:
    """Which integer kernels a kind of device has that are exact and fast: oneDNN's, cuBLAS's, or none.

    On a CPU they need VNNI instructions: without these oneDNN's saturate in 16 bits and return wrong sums, which tells,
    and `torch._int_mm` takes 40 times as long as a product of floats. Of other processors and devices nothing is known.

    Args:
        device_type: `"cpu"`, `"cuda"`, ...
    """
    if device_type == "cpu":
        return "onednn" if platform.machine() in _X86 and onednn.is_exact() else None
    return "cublas" if device_type == "cuda" and cublas.is_exact() else None


class Int8Weight(NamedTuple):
    """A matrix, ready for `int8_linear`.

    Attributes:
        matrix: The codes less `2**(bits - 1)`: int8 `[in, out]`, contiguous, or as oneDNN or cuBLAS takes it.
        scale: float32 `[out]`.
        sums: float32 `[out]`, whole numbers: `code - zero_point` summed over `in`.
        zero_point: float32 `[out]`, whole numbers: the zero points less `2**(bits - 1)`; None if all are zero.
        shape: `out` and `in`.
    """

    matrix: onednn.Packed | cublas.Columns | Tensor
    scale: Tensor
    sums: Tensor
    zero_point: Tensor | None
    shape: torch.Size


def prepare_int8(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8, backend: Backend | None = None
) -> Int8Weight:
    """Lay out a quantized matrix, `(codes - zero_point) * scale`, for `int8_linear`.

    Args:
        codes: Integers `[out, in]` in `[0, 2**bits)`, of any integer dtype.
        scale: Float32, one per row or one in all.
        zero_point: Integers, one per row or one in all; None stands for `2**(bits - 1)`, which is the fastest.
        bits: Bits per code, at most 8.
        backend: The kernels, by default the fastest of the device for a matrix of this size.

    Raises:
        ValueError: A row is too long for sums in 32 bits, or has several scales.

    Example:
        >>> prepare_int8(torch.tensor([[0, 128, 255]]), torch.ones(1, 1), None).matrix.tolist()
        [[-128], [0], [127]]
    """
    signed, scale, zero_point = signed_codes(codes, scale, zero_point, bits)
    sums = signed.sum(dim=1, dtype=torch.int32).float()
    if zero_point is not None:
        sums = sums - codes.shape[1] * zero_point
    if backend is None:
        is_small = codes.is_cpu and codes.numel() < _LEAST_ONEDNN
        backend = "int_mm" if is_small else int8_backend(codes.device.type)
    matrix: onednn.Packed | cublas.Columns | Tensor
    if backend == "onednn":
        matrix = onednn.pack_linear(signed)
    elif backend == "cublas":
        matrix = cublas.pack_linear(signed)
    else:
        matrix = signed.t().clone(memory_format=torch.contiguous_format)  # `_int_mm` mistakes others
    return Int8Weight(matrix, scale, sums, zero_point, codes.shape)


def signed_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes as int8, and scale and zero point of every row, float32 `[out]`; both less `2**(bits - 1)`.

    The zero point is None where all are zero then. That of a row of nothing but zeros is made zero: large corrections
    that cancel would leave their rounding. Raises the errors of `prepare_int8`.
    """
    n_out, n_in = len(codes), codes.shape[1:].numel()
    if n_in > _MAX_IN:
        raise ValueError(f"int8 sums of {n_in} products overflow 32 bits; at most {_MAX_IN} inputs are possible")
    if scale.numel() not in (1, n_out):
        raise ValueError(f"int8 execution needs one scale per row, got {scale.numel()} scales for {n_out} rows")
    middle = 2 ** (bits - 1)
    signed, scale = (codes.short() - middle).to(torch.int8), scale.float().reshape(-1).expand(n_out).contiguous()
    if zero_point is None:
        return signed, scale, None
    zero_point = (zero_point.float() - middle).reshape(-1).expand(n_out).contiguous()  # strides of 0 are slow
    is_empty = (signed.flatten(1) == zero_point[:, None]).all(dim=1)
    signed[is_empty], zero_point[is_empty] = 0, 0
    return signed, scale, zero_point if zero_point.any() else None
