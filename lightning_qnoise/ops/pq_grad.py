"""Gradients of products with a product-quantized matrix; the matrix and its gradient exist a slice at a time.

The gradient of a codeword is the sum, or the mean, over the blocks that carry it. It is accumulated in float32, or
float64 for float64, in an order that only the codes decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops.pq_cpu import row_slices


def input_grad(grad: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """Return `grad @ W`.

    Args:
        grad: Float `[..., out]`.
        codes: Integers `[out, groups]`.
        codebook: Float `[K, d]`.

    Returns:
        `[..., groups * d]` in the dtype of `grad`.
    """
    rows = _rows(grad)
    total = rows.new_zeros(len(rows), codes.shape[1] * codebook.shape[1])
    for part, weight in row_slices(codes, codebook, rows.dtype, len(rows)):
        total.addmm_(rows[:, part], weight)
    return total.to(grad.dtype).view(*grad.shape[:-1], total.shape[1])


def codebook_grad(grad: Tensor, x: Tensor, codes: Tensor, codebook: Tensor, average: bool) -> Tensor:
    """Return the codebook's gradient for `y = x @ W.T`.

    Args:
        grad: Of `y`, float `[..., out]`.
        x: Float `[..., groups * d]`.
        codes: Integers `[out, groups]`.
        codebook: Float `[K, d]`; only its shape and dtype count.
        average: The mean over the blocks of a codeword in place of their sum.

    Returns:
        `[K, d]` in the codebook's dtype.
    """
    left, right = _rows(grad).t(), _rows(x)
    size = max(1, 2**20 // max(1, right.shape[1]))  # 4 MiB of the dense gradient
    total = torch.zeros_like(codebook, dtype=right.dtype, memory_format=torch.contiguous_format)
    for start in range(0, len(left), size):
        part = left[start : start + size] @ right  # [size, in]
        _add_blocks(total, part, codes[start : start + size])
    return _finish(total, codebook, codes if average else None)


def segment_sum(grad: Tensor, picked: Tensor, codebook: Tensor, codes: Tensor | None) -> Tensor:
    """Return the codebook's gradient for `codebook[picked]`.

    Args:
        grad: Float, `[..., groups * d]`.
        picked: Integers `[..., groups]`.
        codebook: Float `[K, d]`; only its shape and dtype count.
        codes: Integers whose number of each kind the sum is divided by, or None.

    Returns:
        `[K, d]` in the codebook's dtype.
    """
    grad = _rows(grad)
    total = torch.zeros_like(codebook, dtype=grad.dtype, memory_format=torch.contiguous_format)
    _add_blocks(total, grad, picked)
    return _finish(total, codebook, codes)


def _rows(x: Tensor) -> Tensor:
    """View as a matrix, in the dtype in which sums are taken."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def _add_blocks(total: Tensor, blocks: Tensor, codes: Tensor) -> None:
    """Add every block to the row that its code names, always in the same order."""
    blocks, indices = blocks.reshape(-1, total.shape[1]), codes.flatten().long()
    if blocks.is_cpu:
        total.scatter_add_(0, indices[:, None].expand_as(blocks), blocks)
    else:  # sorts; `scatter_add_` adds in any order there
        total += torch.ops.aten.embedding_dense_backward(blocks, indices, len(total), -1, False)


def _finish(total: Tensor, codebook: Tensor, codes: Tensor | None) -> Tensor:
    if codes is not None:
        ones = torch.ones_like(codes, dtype=total.dtype).flatten()[:, None]
        counts = total.new_zeros(len(total), 1)
        _add_blocks(counts, ones, codes)
        total = total / counts.clamp(min=1)
    return total.to(codebook.dtype)
