"""Others' products with a compressed matrix: torch's own, AQLM (`pip install aqlm`) and gemlite, where they are there.

A function builds a variant or raises. AQLM computes with the same matrix as we do; the others with random integers of
theirs. Where a peer takes no `x` of the case's dtype, it gets bfloat16, and says so.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from kernel_bench.cases import Weights
from kernel_bench.variants import Variant, n_bytes

GROUP, INNER_TILES = 128, 8  # of int4
AQLM_ROWS = 6  # up to which its layer multiplies a row at a time


def int8(weights: Weights, x: Tensor) -> Variant:
    """`torch._weight_int8pack_mm`: a scale for every output."""
    x = x.bfloat16() if x.dtype == torch.float32 else x  # on a CPU, float32 is not vectorized
    (n_out, n_in), count = weights.shape, weights.copies(weights.shape[0] * weights.shape[1])
    codes = weights.made("int8", lambda: weights.integers(256, count, n_out, n_in).view(torch.int8))
    # divided by 64, the results do not overflow float16
    scales = weights.made("int8 scales", lambda: weights.random(count, n_out, dtype=x.dtype) / 64)
    calls = [partial(torch._weight_int8pack_mm, x, *pair) for pair in zip(codes, scales, strict=True)]
    expected = lru_cache(2)(lambda i: x.double() @ codes[i].double().t() * scales[i].double())
    return _variant("int8 weight-only (torch)", calls, expected, x, weights, codes[0], scales[0])


def int4(weights: Weights, x: Tensor) -> Variant:
    """`torch._weight_int4pack_mm`, which takes bfloat16: a scale and a zero for every 128 inputs of an output."""
    x, (n_out, n_in) = x.bfloat16(), weights.shape
    if n_in % GROUP or n_out % 8:
        raise ValueError(f"takes multiples of 8 outputs and of {GROUP} inputs")
    count, on_cpu = weights.copies(n_out * n_in // 2), weights.device == "cpu"
    codes = weights.made("int4", lambda: weights.integers(16, count, n_out, n_in))
    grid = weights.made("int4 grid", lambda: weights.random(count, n_in // GROUP, n_out, 2, dtype=torch.bfloat16))

    def pack(part: Tensor) -> Tensor:
        if on_cpu:
            return torch._convert_weight_to_int4pack_for_cpu(part.int(), INNER_TILES)
        return torch._convert_weight_to_int4pack(part[:, ::2] << 4 | part[:, 1::2], INNER_TILES)

    @lru_cache(2)
    def expected(i: int) -> Tensor:
        scale, zero = grid[i].double().permute(2, 1, 0).repeat_interleave(GROUP, dim=2)
        return x.double() @ ((codes[i].double() - 8) * scale + zero).t()

    packed = weights.made("int4 packed", lambda: [pack(part) for part in codes])
    multiply = torch._weight_int4pack_mm_for_cpu if on_cpu else torch._weight_int4pack_mm
    calls = [partial(multiply, x, *pair) for pair in zip(packed, [GROUP] * count, grid, strict=True)]
    return _variant("int4 weight-only (torch)", calls, expected, x, weights, packed[0], grid[0])


def gemlite_int4(weights: Weights, x: Tensor) -> Variant:
    """Gemlite's int4 with a scale and a zero for every 128 inputs of an output."""
    _needs_cuda(weights)
    helper = import_module("gemlite.helper")
    n_out, n_in = weights.shape
    count = weights.copies(n_out * n_in // 2)
    codes = weights.made("gemlite codes", lambda: weights.integers(16, count, n_out, n_in))
    scales = weights.made("gemlite scales", lambda: weights.random(count, n_out, n_in // GROUP).abs())

    def layer(part: Tensor, scale: Tensor) -> Any:
        processor = helper.A16W4_HQQ_INT(device=weights.device, dtype=x.dtype)
        return processor.from_weights(part, scale, torch.full_like(scale, 8))

    @lru_cache(2)
    def expected(i: int) -> Tensor:
        return x.double() @ ((codes[i].double() - 8) * scales[i].double().repeat_interleave(GROUP, dim=1)).t()

    pairs = zip(codes, scales, strict=True)
    made = weights.made("gemlite layers", lambda: [layer(*pair) for pair in pairs])
    moved = n_bytes(scales[0], scales[0]) + n_out * n_in // 2
    calls = [partial(each, x) for each in made]
    found = _variant("gemlite int4", calls, expected, x, weights, extra=moved)
    return replace(found, detail=version("gemlite"))


def aqlm_cuda(weights: Weights, x: Tensor) -> Variant:
    """AQLM's CUDA kernel for one codebook of 8 bits; from 7 rows on it decodes, as its layer does."""
    _needs_cuda(weights)
    kernels = import_module("aqlm.inference_kernels")
    kernel = kernels.get_forward_pass_kernel(_tables(weights)[0], len(x) > AQLM_ROWS)
    return _aqlm("AQLM CUDA 1x8", kernel, weights, x, lambda i: x.double() @ weights.matrix(i).t())


def aqlm_triton(weights: Weights, x: Tensor) -> Variant:
    """AQLM's Triton kernel, a launch for every row."""
    _needs_cuda(weights)
    kernels = import_module("aqlm.inference_kernels.triton_kernel")
    tuned = kernels._aqlm_gemv_simple  # tries numbers of stages, which mean nothing to a kernel without a loop
    tuned.configs = [config for config in tuned.configs if config.num_stages == 1]
    return _aqlm("AQLM Triton", kernels.triton_matmul, weights, x, lambda i: x.double() @ weights.matrix(i).t())


def aqlm_dx(weights: Weights, grad: Tensor) -> Variant:
    """AQLM's gradient of the input: it decodes."""
    _needs_cuda(weights)
    kernel = import_module("aqlm.inference_kernels").get_backward_pass_kernel(_tables(weights)[0], True)
    return _aqlm("AQLM CUDA 1x8", kernel, weights, grad, lambda i: grad.double() @ weights.matrix(i))


FORWARD: dict[str, Callable[[Weights, Tensor], Variant]] = {
    "int8 weight-only (torch)": int8,
    "int4 weight-only (torch)": int4,
    "AQLM CUDA 1x8": aqlm_cuda,
    "AQLM Triton": aqlm_triton,
    "gemlite int4": gemlite_int4,
}
DX = {"AQLM CUDA 1x8": aqlm_dx}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds, between two steps of Python."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _needs_cuda(weights: Weights) -> None:
    if weights.device != "cuda":
        raise ImportError("needs a GPU")


def _tables(weights: Weights) -> Tensor:
    """The codebooks `[copies, 1, K, 1, d]` as AQLM takes each."""
    return weights.codebooks[:, None, :, None]


def _aqlm(name: str, kernel: Any, weights: Weights, x: Tensor, expected: Callable[[int], Tensor]) -> Variant:
    """Codes are int8 `[out, groups, 1]`, codebooks `[1, K, 1, d]`, and there is a scale for every output."""
    codes, tables = weights.codes.view(torch.int8)[..., None], _tables(weights)
    scales = torch.ones(weights.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device)
    calls = [partial(kernel, x, *pair, scales, None) for pair in zip(codes, tables, strict=True)]
    found = _variant(name, calls, lru_cache(2)(expected), x, weights, codes[0], tables[0], scales)
    return replace(found, detail=version("aqlm"))


def _variant(
    name: str, calls: list[Any], expected: Any, x: Tensor, weights: Weights, *operands: Tensor, extra: int = 0
) -> Variant:
    result = len(x) * (sum(weights.shape) - x.shape[1]) * x.element_size()
    note = "bfloat16 x" if x.dtype != weights.dtype else ""
    return Variant(name, calls, expected, n_bytes(x, *operands) + result + extra, detail=note)
