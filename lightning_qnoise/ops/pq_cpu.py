"""Product-quantized weights on a CPU: products with a matrix that is never decoded as a whole.

There are three routes (`benchmarks/kernels.py`):

- gather, for one or two rows of `x`: a table of the product of every block of the row with every codeword, and a sum
  of its entries for every output;
- lookup, for more: the same table for up to 64 rows at once, read by `embedding_bag` in runs of 4 to 64 numbers. An
  output costs an addition per block instead of `d` multiplications;
- decode, where the table would cost more than it saves: a slice of the weight at a time, in the same buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured on one AVX-512 core of an AMD EPYC. "Gain" is the multiplications that a table saves for each that it costs.
GATHER_OUT = 0.25  # the fewest outputs per codeword for which gather wins with one or two rows of x,
GATHER_GAIN = 64  # and the gain from which lookup does with two
LOOKUP_GAIN = {8: 12, 16: 24, 32: 32, math.inf: 64}  # most rows -> the least gain for which lookup wins over decode
_BUFFER = 2**18  # elements of a temporary, 1 MiB: it stays in the cache, and malloc keeps its pages
_SLAB = 64  # rows of x per table
_RUNS = 4, 8, 16, 32, 48, 64  # numbers that lie side by side in a table; runs of other lengths are added more slowly


def choose_route(rows: int, n_out: int, n_codewords: int, block_size: int) -> str:
    """Return the fastest route that keeps no dense copy: `"gather"`, `"lookup"` or `"decode"`.

    Args:
        rows: Rows of the input, all its leading dimensions together.
        n_out: Outputs.
        n_codewords: Codewords K.
        block_size: Elements per codeword d.

    Example:
        >>> [choose_route(rows, 4096, 256, 8) for rows in (1, 16)], choose_route(16, 64, 256, 8)
        (['gather', 'lookup'], 'decode')
    """
    gain = n_out * block_size / n_codewords
    if rows <= 2 and n_out >= GATHER_OUT * n_codewords and (rows == 1 or gain < GATHER_GAIN):
        return "gather"
    least = next(least for most, least in LOOKUP_GAIN.items() if rows <= most)
    return "lookup" if gain >= least else "decode"


def linear(x: Tensor, codes: Tensor, codebook: Tensor, route: str | None = None) -> Tensor:
    """Return `x @ W.T` for the matrix `W` of the codes.

    Args:
        x: `[rows, in]`, float32 or float64, in which everything is computed.
        codes: Integers `[out, groups]`.
        codebook: Float `[K, d]`, `groups * d == in`.
        route: One that `choose_route` returns; None asks it.

    Returns:
        `[rows, out]` in the dtype of `x`, contiguous.
    """
    y = x.new_empty(len(x), len(codes))
    if not y.numel() or not x.numel():
        return y.zero_()
    route = route or choose_route(len(x), len(codes), *codebook.shape)
    {"gather": _gather, "lookup": _lookup, "decode": _decode}[route](x, codes, codebook, y)
    return y


def decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, groups * d]` of codes `[out, groups]` and a codebook `[K, d]`."""
    weight = codebook.new_empty(len(codes), codes.shape[1] * codebook.shape[1], dtype=dtype)
    for part, decoded in row_slices(codes, codebook, dtype):
        weight[part] = decoded
    return weight


def row_slices(codes: Tensor, codebook: Tensor, dtype: torch.dtype, rows: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the outputs with their part of the decoded matrix; one part lies where the last one did.

    Args:
        codes: Integers `[out, groups]`.
        codebook: Float `[K, d]`.
        dtype: Dtype of the parts.
        rows: Rows that each part is to be multiplied with; many want larger parts.
    """
    n_out, groups = codes.shape
    n_in = groups * codebook.shape[1]
    words = _words(codebook)
    largest = _BUFFER * min(16, max(1, rows // 16))
    size = max(1, min(n_out, largest // max(1, n_in)))
    buffer = torch.empty(size * groups, len(words), *words[0].shape[1:], dtype=words[0].dtype, device=codes.device)
    for start in range(0, n_out, size):
        part = codes[start : start + size]
        indices, decoded = part.flatten().int(), buffer[: part.numel()]
        for i, word in enumerate(words):
            torch.index_select(word, 0, indices, out=decoded[:, i])
        yield slice(start, start + size), decoded.view(codebook.dtype).view(len(part), n_in).to(dtype)


def _words(codebook: Tensor) -> list[Tensor]:
    """Return the codebook `[K, d]` as one or two columns that are quick to copy, or as it is `[K, d]`."""
    n_bytes = codebook.shape[1] * codebook.element_size()
    word = torch.complex128 if n_bytes % 16 == 0 else torch.int64 if n_bytes % 8 == 0 else None
    if word is None or n_bytes > 2 * word.itemsize:
        return [codebook]
    return [column.clone() for column in codebook.clone(memory_format=torch.contiguous_format).view(word).unbind(1)]


def _decode(x: Tensor, codes: Tensor, codebook: Tensor, y: Tensor) -> None:
    for part, weight in row_slices(codes, codebook, x.dtype, len(x)):
        y[:, part] = F.linear(x, weight)


def _gather(x: Tensor, codes: Tensor, codebook: Tensor, y: Tensor) -> None:
    (n_out, groups), (n_codewords, block_size) = codes.shape, codebook.shape
    tables = torch.matmul(x.view(len(x), groups, block_size), codebook.to(x.dtype).t()).flatten(1)
    first = torch.arange(groups, dtype=torch.int32, device=codes.device) * n_codewords
    size = max(1, _BUFFER // groups)
    buffer = x.new_empty(min(size, n_out) * groups)
    for start in range(0, n_out, size):
        indices = (codes[start : start + size] + first).flatten()
        found = buffer[: indices.numel()]
        for row, table in enumerate(tables):
            torch.index_select(table, 0, indices, out=found)
            torch.sum(found.view(-1, groups), dim=1, out=y[row, start : start + size])


def _lookup(x: Tensor, codes: Tensor, codebook: Tensor, y: Tensor) -> None:
    groups, (n_codewords, block_size) = codes.shape[1], codebook.shape
    codebook = codebook.to(x.dtype)
    for start in range(0, len(x), _SLAB):
        rows = x[start : start + _SLAB]
        n, wide = len(rows), next(run for run in _RUNS if run >= len(rows))
        blocks = F.pad(rows, (0, 0, 0, wide - n)).view(wide, groups, block_size).permute(2, 1, 0).flatten(1)
        size = max(1, min(groups, min(_BUFFER, 2**14 * wide) // (n_codewords * wide)))
        total, first = x.new_zeros(len(codes), wide), torch.arange(size, dtype=torch.int32, device=codes.device)
        for group in range(0, groups, size):
            part = codes[:, group : group + size]
            n_own = part.shape[1]
            table = torch.mm(codebook, blocks[:, group * wide : (group + n_own) * wide])  # [K, n_own * wide]
            places = torch.add(first[:n_own], part, alpha=n_own)
            total += F.embedding_bag(places, table.view(-1, wide), mode="sum")
        y[start : start + n] = total.t()[:n]
