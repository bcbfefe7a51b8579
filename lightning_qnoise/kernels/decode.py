"""The dense weight of codes and codebook, or some of its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qnoise.kernels.common import TL_DTYPES, check_codes, check_device
from lightning_qnoise.kernels.layout import pad_codebook


@triton.jit
def decode_kernel(
    codes,
    codebook,
    ids,
    out,
    stride_o,
    stride_g,
    n_codes,
    n_out,
    groups,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program writes `[BLOCK_O, BLOCK_G * D]` of the rows `ids`, or of all, of which there are `n_codes`.

    Neighbouring lanes have neighbouring groups: they read the codes of whole sectors and write whole lines.
    """
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    source = tl.minimum(rows, n_out - 1).to(tl.int64)
    if ids is not None:
        asked = tl.load(ids + source).to(tl.int64)
        source = tl.where((asked >= 0) & (asked < n_codes), asked, 0)
    address = codes + source[:, None] * stride_o + tl.minimum(group, groups - 1)[None, :].to(tl.int64) * stride_g
    code = tl.load(address).to(tl.int64)
    e = tl.arange(0, WIDTH)[None, None, :]
    values = tl.load(codebook + code[:, :, None] * WIDTH + e)
    if ids is not None:
        values = tl.where((source == asked)[:, None, None], values.to(tl.float32), float("nan"))
    target = out + (rows[:, None].to(tl.int64) * groups + group[None, :])[:, :, None] * D + e
    values = values.to(out.dtype.element_ty)
    tl.store(target, values, mask=((rows[:, None] < n_out) & (group[None, :] < groups))[:, :, None] & (e < D))


def launch_decode(codes: Tensor, codebook: Tensor, ids: Tensor | None, out: Tensor) -> Tensor:
    """Write the rows `ids` of the weight, or all, to a contiguous `[n, groups * d]`, whose dtype the codebook has."""
    check_device(decode_kernel, codes, codebook, ids, out)
    if out.numel() == 0:
        return out
    (n_codes, groups), d = codes.shape, codebook.shape[1]
    codebook = pad_codebook(codebook)
    width = codebook.shape[1]
    block_g = max(256 // width, 1)
    block_o = max(4096 // (block_g * width), 1)
    n_out = out.numel() // (groups * d)
    with torch.cuda.device_of(out):
        decode_kernel[(triton.cdiv(n_out, block_o), triton.cdiv(groups, block_g))](
            codes,
            codebook,
            ids,
            out,
            *codes.stride(),
            n_codes,
            n_out,
            groups,
            D=d,
            WIDTH=width,
            BLOCK_O=block_o,
            BLOCK_G=block_g,
            num_warps=4,
        )
    return out


def pq_decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Write the weight `[out, groups * d]`.

    Args:
        codes: uint8, int16 or int32 `[out, groups]`, of any strides.
        codebook: Float16, bfloat16 or float32 `[K, d]`.
        dtype: One of these; that of the codebook by default.
        out: Contiguous `[out, groups * d]` to write to.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
    """
    check_codes(codes, codebook)
    shape = (codes.shape[0], codes.shape[1] * codebook.shape[1])
    if out is None:
        out = codebook.new_empty(shape, dtype=dtype)
    if out.dtype not in TL_DTYPES or dtype not in (None, out.dtype):
        raise TypeError(f"cannot decode to {dtype} in a tensor of {out.dtype}")
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"the weight is contiguous {list(shape)}, got {list(out.shape)}")
    return launch_decode(codes, codebook.to(out.dtype), None, out)
