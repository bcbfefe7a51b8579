"""What the launchers share: the checks of their arguments, how codes are read, the sum of split results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Tiles(NamedTuple):
    """How one lane reads the codes of one row: `tile` words at once, `per_word` codes each, see `code_tiles`."""

    words: Tensor  # [out, groups / per_word]
    strides: tuple[int, int]  # in tiles from row to row, in words from word to word
    per_word: int
    tile: int
    steps: int  # tiles of a row; the last one is whole


def interpreted(kernel: Any) -> bool:
    """Whether a kernel runs in the interpreter; triton decides that when the kernel is defined."""
    return isinstance(kernel, InterpretedFunction)


def check_device(kernel: Any, *tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one GPU, or the kernel is interpreted."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise ValueError(f"a Triton kernel needs its tensors on one device, got {sorted(map(str, devices))}")
    if devices.pop().type != "cuda" and not interpreted(kernel):
        raise ValueError("a Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1 set before its module is imported")


def check_dtypes(*tensors: Tensor | None) -> None:
    """Raise unless all tensors are float16, bfloat16 or float32."""
    wrong = {str(tensor.dtype) for tensor in tensors if tensor is not None and tensor.dtype not in TL_DTYPES}
    if wrong:
        raise TypeError(f"a Triton kernel computes in float16, bfloat16 or float32, got {sorted(wrong)}")


def check_codes(codes: Tensor, codebook: Tensor) -> None:
    """Check codes `[out, groups]` and codebook `[K, d]`, both of any strides."""
    if codes.dtype not in (torch.uint8, torch.int16, torch.int32):
        raise TypeError(f"codes are in uint8, int16 or int32, got {codes.dtype}")
    if codes.ndim != 2 or codebook.ndim != 2 or not codebook.numel():
        shapes = f"{list(codes.shape)} and {list(codebook.shape)}"
        raise ValueError(f"codes and codebook are [out, groups] and [K, d] with K, d > 0, got {shapes}")
    check_dtypes(codebook)


def check_input(x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None, splits: int | None) -> None:
    """Check the arguments of a product `x W^T + bias`."""
    check_codes(codes, codebook)
    check_dtypes(x, bias)
    n_out, n_in = codes.shape[0], codes.shape[1] * codebook.shape[1]
    if x.ndim != 2 or x.shape[1] != n_in:
        raise ValueError(f"the input is [M, {n_in}], got {list(x.shape)}")
    if bias is not None and (bias.shape != (n_out,) or not bias.is_contiguous()):
        raise ValueError(f"the bias is contiguous [{n_out}], got {list(bias.shape)}")
    if codebook.shape[1] > 32:  # unrolled, a larger one takes too many registers and minutes to compile
        raise ValueError(f"the kernels of products take blocks of 32 columns at most, got {codebook.shape[1]}")
    if splits is not None and splits < 1:
        raise ValueError(f"a sum has 1 part or more, got {splits}")


def product_of_nothing(x: Tensor, n_out: int, bias: Tensor | None) -> Tensor:
    """Return `x W^T + bias` for a weight or an input without elements."""
    y = x.new_zeros(len(x), n_out)
    return y if bias is None else y + bias.to(x.dtype)


def code_tiles(codes: Tensor, widest: int = 4) -> Tiles:
    """Return how to read codes `[out, groups]` where they lie, at most `widest` words, 1 or 4, at once.

    A lane reads 16 bytes of its row, if rows are of whole 16 bytes.
    """
    (stride_o, stride_g), groups, per_word = codes.stride(), codes.shape[1], 1
    starts = (stride_o, codes.storage_offset(), codes.data_ptr(), groups)
    if codes.dtype == torch.uint8 and stride_g == 1 and not any(n % 4 for n in starts):
        codes, stride_o, per_word = codes.view(torch.int32), stride_o // 4, 4
    n_words = codes.shape[1]
    tile = 1 if n_words % widest or stride_o % widest else widest
    return Tiles(codes, (stride_o // tile, stride_g), per_word, tile, n_words // tile)


def n_splits(device: torch.device, programs: int, steps: int, per_processor: int = 4, most: int = 64) -> int:
    """In how many parts, at most, to split `steps` of a sum, for some programs on each processor of a GPU."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(steps, triton.cdiv(per_processor * processors, max(programs, 1)), most, 64))


def most_splits(codes: Tensor, rows: int, share: int) -> int:
    """In how many parts to split, so that the partial sums take one of `share` of the bytes of the codes at most."""
    return codes.shape[1] * codes.element_size() // (share * 4 * rows)


@triton.jit
def tile_pointers(words, rows, n_out, stride_o, stride_w, TILE: tl.constexpr):
    """Return the addresses `[rows, TILE]` of the first tile of some rows; past the end, those of the last row.

    The stride counts tiles so that the compiler sees that a row starts at one.
    """
    inside = tl.minimum(rows, n_out - 1).to(tl.int64)
    return words + inside[:, None] * stride_o * TILE + tl.arange(0, TILE)[None, :] * stride_w


@triton.jit
def split_tile(tile, TILE: tl.constexpr):
    """Return the columns of a tile `[rows, TILE]`, which one lane holds, without moving them between lanes."""
    if TILE == 4:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    else:  # the compiler does not know that a branch has returned
        return (tl.reshape(tile, [tile.shape[0]]),)


@triton.jit
def code_of(word, j: tl.constexpr, PER_WORD: tl.constexpr):
    """Return code j of a word: its j-th byte, or all of it."""
    code = word.to(tl.int32)
    if PER_WORD == 4:
        code = (code >> (8 * j)) & 255
    return code


@triton.jit
def sum_splits_kernel(partial, out, scale, bias, n, n_out, n_parts, BLOCK: tl.constexpr):
    """`out[i] = sum over s of partial[s, i]`, in the order of s, times `scale` plus `bias` at `i % n_out`."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(n_parts):
        total += tl.load(partial + tl.cast(part, tl.int64) * n + offsets, mask=inside, other=0.0)
    if scale is not None:
        total *= tl.load(scale + offsets % n_out, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + offsets % n_out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def sum_splits(partial: Tensor, dtype: torch.dtype, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Sum float32 `[splits, rows, out]` in a fixed order; `scale` and `bias` are `[out]` or None."""
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    grid = (triton.cdiv(out.numel(), 256),)
    sum_splits_kernel[grid](partial, out, scale, bias, out.numel(), out.shape[1], len(partial), BLOCK=256, num_warps=4)
    return out
