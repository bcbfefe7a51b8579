"""Gradients of products with a product-quantized matrix on a GPU; the matrix and its gradient exist a slice at a time.

The gradient of the matrix is rounded to the dtype of its factors, as that of a Linear layer is; the sums over the
blocks of a codeword are in float32 and in an order that only the codes decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops import pq_cuda
from lightning_qnoise.ops.pq_cuda import kernel_codes, slices


def input_grad(grad: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """Return `grad @ W`; slices along the inputs leave every sum to one product.

    Args:
        grad: `[..., out]`, float16, bfloat16 or float32.
        codes: Integers `[out, groups]`.
        codebook: Float `[K, d]`, which is rounded to the dtype of `grad`.

    Returns:
        `[..., groups * d]` in the dtype of `grad`.
    """
    rows, d = _rows(grad), codebook.shape[1]
    total = rows.new_empty(len(rows), codes.shape[1] * d)
    for part, weight in slices(kernel_codes(codes), codebook.to(grad.dtype), 1):
        torch.mm(rows, weight, out=total[:, part.start * d : part.stop * d])
    return total.view(*grad.shape[:-1], total.shape[1])


def codebook_grad(grad: Tensor, x: Tensor, codes: Tensor, codebook: Tensor, average: bool) -> Tensor:
    """Return the codebook's gradient for `y = x @ W.T`.

    Args:
        grad: Of `y`, `[..., out]`, float16, bfloat16 or float32.
        x: `[..., groups * d]` in the dtype of `grad`.
        codes: Integers `[out, groups]`.
        codebook: Float `[K, d]`; only its shape and dtype count.
        average: The mean over the blocks of a codeword in place of their sum.

    Returns:
        `[K, d]` in the codebook's dtype.
    """
    left, right, codes = _rows(grad), _rows(x), kernel_codes(codes)
    size = max(1, pq_cuda.SLICE_BYTES // (right.shape[1] * right.element_size()))
    buffer = right.new_empty(min(size, len(codes)), right.shape[1])
    total = torch.zeros(codebook.shape, dtype=torch.float32, device=grad.device)
    counts = torch.zeros(len(codebook), dtype=torch.int32, device=grad.device)
    for start in range(0, len(codes), size):
        part = codes[start : start + size]
        blocks = torch.mm(left[:, start : start + size].t(), right, out=buffer[: len(part)])
        sums, counted = _sum_blocks(blocks, part, codebook)
        total, counts = total + sums, counts + counted
    return _finish(total, counts if average else None, codebook)


def segment_sum(grad: Tensor, picked: Tensor, codebook: Tensor, codes: Tensor | None) -> Tensor:
    """Return the codebook's gradient for `codebook[picked]`.

    Args:
        grad: `[..., groups * d]`, float16, bfloat16 or float32.
        picked: Integers `[..., groups]`.
        codebook: Float `[K, d]`; only its shape and dtype count.
        codes: Integers whose number of each kind the sum is divided by, or None.

    Returns:
        `[K, d]` in the codebook's dtype.
    """
    from lightning_qnoise.kernels.layout import segments

    total, counts = _sum_blocks(grad, kernel_codes(picked), codebook)
    if codes is None:
        return _finish(total, None, codebook)
    if codes is not picked:
        counts = segments(kernel_codes(codes), len(codebook))[1].diff()
    return _finish(total, counts, codebook)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _sum_blocks(blocks: Tensor, codes: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the blocks of each codeword, float32 `[K, d]`, and their number, int32 `[K]`."""
    from lightning_qnoise.kernels import layout
    from lightning_qnoise.kernels.segment_sum import segment_sum

    order, offsets = layout.segments(codes, len(codebook))
    blocks = blocks.reshape(-1, codebook.shape[1]).contiguous()
    return segment_sum(blocks, order, offsets), offsets.diff()


def _finish(total: Tensor, counts: Tensor | None, codebook: Tensor) -> Tensor:
    if counts is not None:
        total = total / counts.clamp(min=1)[:, None]
    return total.to(codebook.dtype)
