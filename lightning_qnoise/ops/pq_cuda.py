"""Product-quantized weights on a GPU: which kernel serves a product, and the matrix where none does.

There are four routes, all of which read the codes as they are stored:

- lookup, for a row of `x` or a few and so many outputs that its table is small beside the codes: the products of `x`
  with every codeword, and a sum of them for every output;
- gemv, for a few rows otherwise: every output decodes its row in registers;
- gemm: tiles of the weight are decoded into the operands of tensor cores;
- decode, for the rest: a slice of the weight at a time, in the same buffer, and torch's own product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The most rows of `x` that a route serves."""

    lookup: int
    gemv: int
    gemm: int


# Predicted by counts of memory accesses, not measured yet; from two outputs a codeword on lookup is thought the faster.
ROWS = {
    torch.float16: Rows(lookup=4, gemv=15, gemm=256),
    torch.bfloat16: Rows(lookup=4, gemv=15, gemm=256),
    torch.float32: Rows(lookup=4, gemv=16, gemm=0),  # its products do not run on tensor cores
}
LOOKUP_OUT = 32  # outputs for each codeword and row from which the table takes at most an eighth of the bytes of codes
KERNEL_BLOCK = 32  # the largest codeword that the kernels of products take
SLICE_BYTES = 2**25  # of a decoded slice, or of a slice of its gradient
CODE_DTYPES = (torch.uint8, torch.int16, torch.int32)


def choose_route(rows: int, n_out: int, n_codewords: int, block_size: int, dtype: torch.dtype) -> str:
    """Return the fastest route: `"lookup"`, `"gemv"`, `"gemm"` or `"decode"`.

    Args:
        rows: Rows of the input, all its leading dimensions together.
        n_out: Outputs.
        n_codewords: Codewords K.
        block_size: Elements per codeword d.
        dtype: Of the input, float16, bfloat16 or float32.

    Example:
        >>> [choose_route(rows, 8192, 256, 8, torch.float16) for rows in (1, 2, 16, 257)]
        ['lookup', 'gemv', 'gemm', 'decode']
    """
    most = ROWS[dtype]
    if block_size > KERNEL_BLOCK:
        return "decode"
    if rows <= most.lookup and n_out >= LOOKUP_OUT * n_codewords * rows:
        return "lookup"
    return "gemv" if rows <= most.gemv else "gemm" if rows <= most.gemm else "decode"


def serves(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether there are kernels for this dtype, and something to compute.

    Args:
        dtype: In which everything is computed.
        tensors: The arguments without a bias.

    Example:
        >>> x = torch.zeros(2, 4)
        >>> serves(x.dtype, x), serves(torch.float64, x), serves(x.dtype, x[:0])
        (True, False, False)
    """
    return dtype in ROWS and all(tensor.numel() for tensor in tensors)


def linear(x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, route: str | None = None) -> Tensor:
    """Return `x @ W.T + bias`; the sums are in float32, to which the kernels add the bias.

    Args:
        x: `[..., groups * d]`, float16, bfloat16 or float32.
        codes: Integers `[out, groups]`; other dtypes than those of `CODE_DTYPES` are copied.
        codebook: Float `[K, d]`, which is rounded to the dtype of `x`.
        bias: Float `[out]` or None; decode rounds it to the dtype of `x`, as `F.linear` would.
        route: One that `choose_route` returns; None asks it.

    Returns:
        `[..., out]` in the dtype of `x`, contiguous.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    codes, codebook = kernel_codes(codes), codebook.to(x.dtype)
    n_codewords, block_size = codebook.shape
    route = route or choose_route(len(rows), len(codes), n_codewords, block_size, x.dtype)
    if route == "decode":
        y = _product_of_slices(rows, codes, codebook, None if bias is None else bias.to(x.dtype))
    else:
        from lightning_qnoise.kernels.gemm import pq_gemm
        from lightning_qnoise.kernels.gemv import pq_gemv
        from lightning_qnoise.kernels.table_gemv import pq_table_gemv

        if bias is not None:
            bias = (bias if bias.dtype in ROWS else bias.float()).contiguous()
        kernels: dict[str, Callable[..., Tensor]] = {"lookup": pq_table_gemv, "gemv": pq_gemv, "gemm": pq_gemm}
        y = kernels[route](rows, codes, codebook, bias)
    return y.view(*x.shape[:-1], len(codes))


def decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, groups * d]`, float16, bfloat16 or float32, of codes `[out, groups]`."""
    from lightning_qnoise.kernels.decode import pq_decode

    return pq_decode(kernel_codes(codes), codebook.to(dtype))


def embedding(ids: Tensor, codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows `ids` of the matrix, `[*ids.shape, groups * d]`; NaN for an id that names no row."""
    from lightning_qnoise.kernels.embedding import pq_embedding

    return pq_embedding(ids, kernel_codes(codes), codebook.to(dtype))


def kernel_codes(codes: Tensor) -> Tensor:
    """Return the codes as the kernels read them: themselves, but for dtypes of 8 bytes and the like."""
    return codes if codes.dtype in CODE_DTYPES else codes.int()


def slices(codes: Tensor, codebook: Tensor, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the outputs, or groups, with their part of the matrix; one part lies where the last one did.

    Args:
        codes: `[out, groups]`, of one of `CODE_DTYPES`.
        codebook: `[K, d]`, float16, bfloat16 or float32, which the parts have, too.
        dim: 0 to slice outputs, 1 to slice groups.
    """
    from lightning_qnoise.kernels.decode import pq_decode

    n, d, other = codes.shape[dim], codebook.shape[1], codes.shape[1 - dim]
    size = SLICE_BYTES // (other * d * codebook.element_size())
    size = min(n, max(1, size - size % 16 if size > 16 else size))  # products prefer even shapes
    buffer = codebook.new_empty(size * other * d)
    for start in range(0, n, size):
        part = codes.narrow(dim, start, min(size, n - start))
        out = buffer[: part.numel() * d].view(part.shape[0], -1)
        yield slice(start, start + part.shape[dim]), pq_decode(part, codebook, out=out)


def _product_of_slices(x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(len(x), len(codes))
    for part, weight in slices(codes, codebook, 0):
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], x, weight.t(), out=y[:, part])
    return y
