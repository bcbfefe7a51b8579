"""The dense weight of codes and codebook."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import TL_DTYPES, check_codes, check_device, code_of


@triton.jit
def decode_kernel(
    words,
    codebook,
    out,
    n_out,
    n_in,
    groups,
    n_centroids,
    groups_per_codebook,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program writes `[BLOCK_O, BLOCK_G * D]` of the weight, a row of the codebook by wide loads and stores."""
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    inside = (rows < n_out) & (group < groups)
    word = tl.load(words + (group // PER_WORD).to(tl.int64) * n_out + rows, mask=inside, other=0)
    row = code_of(word, group, BITS, PER_WORD) + (group // groups_per_codebook) * n_centroids
    e = tl.arange(0, WIDTH)[None, None, :]
    column = group[:, :, None] * D + e
    used = inside[:, :, None] & (e < D) & (column < n_in)
    values = tl.load(codebook + row[:, :, None].to(tl.int64) * WIDTH + e, mask=used, other=0.0)
    target = out + rows[:, :, None].to(tl.int64) * n_in + column
    tl.store(target, values.to(tl.float32).to(out.dtype.element_ty), mask=used)


def pq_decode(
    words: Tensor,
    codebook: Tensor,
    n_in: int,
    block_size: int,
    bits: int = 8,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Write the weight `[out, in]`.

    Args:
        words: Codes `[ceil(groups / n), out]`, n of them in an element: int32 of `pack_words`, or plain uint8 or int16.
        codebook: `[n_codebooks, K, width]` of `pad_codebook`.
        n_in: Columns of the weight; the last block may be cut.
        block_size: d, the columns of a block.
        bits: Bits per code.
        dtype: float16, bfloat16 or float32; that of the codebook by default.
        out: Contiguous `[out, in]` to write to.

    Raises:
        ValueError: A layout or a device does not fit.
        TypeError: A dtype does not fit.
    """
    size = check_codes(words, codebook, n_in, block_size, bits)
    if out is None:
        out = codebook.new_empty(size.n_out, n_in, dtype=dtype)
    if out.dtype not in TL_DTYPES or dtype not in (None, out.dtype):
        raise TypeError(f"cannot decode to {dtype} in a tensor of {out.dtype}")
    if out.shape != (size.n_out, n_in) or not out.is_contiguous():
        raise ValueError(f"the weight is contiguous {[size.n_out, n_in]}, got {list(out.shape)}")
    check_device(decode_kernel, words, codebook, out)
    if out.numel() == 0:
        return out
    block_g = max(64 // size.width, 1)
    grid = (triton.cdiv(size.n_out, 64), triton.cdiv(size.groups, block_g))
    with torch.cuda.device_of(out):
        decode_kernel[grid](
            words,
            codebook,
            out,
            size.n_out,
            n_in,
            size.groups,
            size.n_centroids,
            size.groups_per_codebook,
            D=block_size,
            WIDTH=size.width,
            BITS=bits,
            PER_WORD=size.per_word,
            BLOCK_O=64,
            BLOCK_G=block_g,
            num_warps=4,
        )
    return out
