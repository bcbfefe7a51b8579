"""cuBLAS's products of bytes: the exact sums, of matrices that are padded to the sizes that it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_ROWS = 17
_MULTIPLE = 8  # of inputs and outputs


class Columns(NamedTuple):
    """A weight by columns, as tensor cores read it; by rows it took twice the time (PyTorch's issue 187094).

    Attributes:
        weight: int8 `[in, out]`, both padded to multiples of 8; the transpose of what lies in memory.
        n_out: Outputs, without those that were added.
    """

    weight: Tensor
    n_out: int


def pack_linear(codes: Tensor) -> Columns:
    """Lay out an int8 matrix `[out, in]`.

    Example:
        >>> pack_linear(torch.ones(3, 10, dtype=torch.int8)).weight.shape
        torch.Size([16, 8])
    """
    n_out, n_in = codes.shape
    padded = F.pad(codes, (0, -n_in % _MULTIPLE, 0, -n_out % _MULTIPLE))
    return Columns(padded.contiguous().t(), n_out)


def linear(x: Tensor, matrix: Columns) -> Tensor:
    """Return `x @ W.T`, float32 `[rows, out]`, for `x` int8 `[rows, in]`, contiguous.

    Example:
        >>> linear(torch.ones(1, 10, dtype=torch.int8), pack_linear(torch.ones(3, 10, dtype=torch.int8)))
        tensor([[10., 10., 10.]])
    """
    (rows, n_in), (weight, n_out) = x.shape, matrix
    more_in, more_rows = len(weight) - n_in, max(0, _LEAST_ROWS - rows)
    x = F.pad(x, (0, more_in, 0, more_rows)) if more_in or more_rows else x
    return torch._int_mm(x, weight)[:rows, :n_out].to(torch.float32, memory_format=torch.contiguous_format)


def is_exact() -> bool:
    """Whether the current GPU has such products."""
    try:
        codes = torch.full((32, 64), 127, dtype=torch.int8, device="cuda")
        return bool((linear(codes, pack_linear(codes)) == 64 * 127**2).all())
    except (AssertionError, RuntimeError):  # torch without CUDA; not implemented there
        return False
