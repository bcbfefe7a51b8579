"""Operators on a product-quantized matrix `W[o, g * d + e] = codebook[codes[o, g], e]`, with gradients.

They are `torch.ops.lightning_qnoise.pq_decode`, `pq_linear` and `pq_embedding`, opaque to `torch.compile`. What they
compute they accumulate in float32 (float64 for float64 inputs). No second derivative exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops import pq_library  # noqa: F401  registers the operators


def pq_decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype | None = None, average: bool = False) -> Tensor:
    """Return the matrix.

    Args:
        codes: Integers below K `[out, groups]`, of any integer dtype.
        codebook: Float `[K, d]`.
        dtype: Of the result; None takes the codebook's.
        average: Let the codebook's gradient be the mean over the blocks of a codeword, not their sum.

    Returns:
        `[out, groups * d]`.

    Raises:
        ValueError: A shape does not fit.

    Example:
        >>> pq_decode(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[1., 2., 3., 4.],
                [3., 4., 3., 4.]])
    """
    return torch.ops.lightning_qnoise.pq_decode(codes, codebook, dtype, average)


def pq_linear(x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, average: bool = False) -> Tensor:
    """Return `x @ W.T + bias`; on a CPU, with no dense copy of `W`. Under autocast it casts as `F.linear` does.

    Args:
        x: Float `[..., groups * d]`.
        codes: Integers below K `[out, groups]`, of any integer dtype.
        codebook: Float `[K, d]`, of any dtype.
        bias: Float `[out]`, of any dtype, or None.
        average: Let the codebook's gradient be the mean over the blocks of a codeword, not their sum.

    Returns:
        `[..., out]` in the dtype of `x`.

    Raises:
        ValueError: A shape does not fit.

    Example:
        >>> codes, codebook = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> pq_linear(torch.tensor([1.0, 0.0, 1.0, 0.0]), codes, codebook, torch.tensor([0.0, 10.0]))
        tensor([ 4., 16.])
    """
    return torch.ops.lightning_qnoise.pq_linear(x, codes, codebook, bias, average)


def pq_embedding(
    ids: Tensor,
    codes: Tensor,
    codebook: Tensor,
    dtype: torch.dtype | None = None,
    padding_idx: int | None = None,
    average: bool = False,
) -> Tensor:
    """Return rows of the matrix.

    Args:
        ids: int32 or int64, any shape. One that names no row is an error on a CPU, and NaN in a kernel of a GPU.
        codes: Integers below K `[rows, groups]`, of any integer dtype.
        codebook: Float `[K, d]`.
        dtype: Of the result; None takes the codebook's.
        padding_idx: The row, counted from 0, that passes no gradient on.
        average: Let the codebook's gradient be the mean over the blocks of a codeword in `codes`, not their sum.

    Returns:
        `[*ids.shape, groups * d]`.

    Raises:
        ValueError: A shape does not fit.

    Example:
        >>> codes, codebook = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> pq_embedding(torch.tensor([1, 0]), codes, codebook)
        tensor([[3., 4., 3., 4.],
                [1., 2., 3., 4.]])
    """
    return torch.ops.lightning_qnoise.pq_embedding(ids, codes, codebook, dtype, padding_idx, average)
