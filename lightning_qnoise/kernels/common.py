"""What the launchers share: the checks of their arguments, the codes out of the words, the sum of split results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Sizes(NamedTuple):
    """What `words` and `codebook` say about a weight `[out, in]`, see `check_codes`."""

    groups: int
    n_out: int
    n_centroids: int
    width: int  # of a row of the codebook, a power of two
    groups_per_codebook: int
    per_word: int


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


def check_codes(words: Tensor, codebook: Tensor, n_in: int, block_size: int, bits: int) -> Sizes:
    """Check the layout of codes and codebook, see `layout`, and return the sizes.

    An element of `words` holds as many codes of `bits` as fit: 4 in an int32 of `pack_words`, 1 in a uint8.
    """
    if words.dtype not in (torch.uint8, torch.int16, torch.int32) or bits not in (1, 2, 4, 8, 16):
        raise TypeError(f"codes of 1 to 16 bits, a power of two, in uint8, int16 or int32; got {bits} in {words.dtype}")
    per_word, groups = 8 * words.element_size() // bits, triton.cdiv(n_in, block_size)
    expected = triton.cdiv(groups, max(per_word, 1))
    if not per_word or words.ndim != 2 or len(words) != expected or not words.is_contiguous():
        got = f"{words.dtype} {list(words.shape)} with strides {words.stride()}"
        raise ValueError(f"{groups} groups of codes of {bits} bits are contiguous [{expected}, out], got {got}")
    width = triton.next_power_of_2(block_size)
    if codebook.ndim != 3 or codebook.shape[2] != width or not codebook.is_contiguous() or groups % len(codebook):
        got = f"{list(codebook.shape)} with strides {codebook.stride()}"
        raise ValueError(f"a codebook is contiguous [n, K, {width}] and n divides {groups} groups, got {got}")
    check_dtypes(codebook)
    n_codebooks, n_centroids, _ = codebook.shape
    return Sizes(groups, words.shape[1], n_centroids, width, groups // n_codebooks, per_word)


def check_input(x: Tensor, n_in: int, n_out: int, bias: Tensor | None, scale: Tensor | None) -> None:
    """Check the input `[M, in]` and what the result `[M, out]` is scaled and shifted by."""
    check_dtypes(x, bias, scale)
    if x.ndim != 2 or x.shape[1] != n_in:
        raise ValueError(f"the input is [M, {n_in}], got {list(x.shape)}")
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None and (vector.shape != (n_out,) or not vector.is_contiguous()):
            raise ValueError(f"the {name} is contiguous [{n_out}], got {list(vector.shape)}")


def n_splits(device: torch.device, programs: int, steps: int, per_processor: int = 4) -> int:
    """In how many parts to split `steps` of a sum, for some programs on each processor of a GPU."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(steps, triton.cdiv(per_processor * processors, max(programs, 1)), 64))


@triton.jit
def code_of(word, group, BITS: tl.constexpr, PER_WORD: tl.constexpr):
    """Return the code of a group out of the word that holds it."""
    return (word.to(tl.int32) >> ((group % PER_WORD) * BITS)) & ((1 << BITS) - 1)


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
