"""Registers the operators of `pq`: their references, gradients and routes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qnoise.ops import pq_cpu, pq_cuda, pq_cuda_grad, pq_grad
from lightning_qnoise.ops.library import OPS, register


def _check(codes: Tensor, codebook: Tensor, x: Tensor | None = None, bias: Tensor | None = None) -> None:
    if codes.ndim != 2 or codebook.ndim != 2 or codes.is_floating_point():
        shapes = f"{codes.dtype} {list(codes.shape)} and {list(codebook.shape)}"
        raise ValueError(f"expected integer codes [out, groups] and a codebook [K, d], got {shapes}")
    n_out, n_in = codes.shape[0], codes.shape[1] * codebook.shape[1]
    if x is not None and (not x.ndim or x.shape[-1] != n_in):
        raise ValueError(f"expected an input [..., {n_in}], got {list(x.shape)}")
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"expected a bias [{n_out}], got {list(bias.shape)}")


def _decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype | None = None, average: bool = False) -> Tensor:
    """The reference; it also says what comes out, where nothing is computed."""
    _check(codes, codebook)
    return F.embedding(codes.int(), codebook.to(dtype or codebook.dtype)).flatten(-2)


def _decode_cpu(codes: Tensor, codebook: Tensor, dtype: torch.dtype | None = None, average: bool = False) -> Tensor:
    _check(codes, codebook)
    return pq_cpu.decode(codes, codebook, dtype or codebook.dtype)


def _decode_cuda(codes: Tensor, codebook: Tensor, dtype: torch.dtype | None = None, average: bool = False) -> Tensor:
    _check(codes, codebook)
    dtype = dtype or codebook.dtype
    served = pq_cuda.serves(dtype, codes, codebook)
    return pq_cuda.decode(codes, codebook, dtype) if served else _decode(codes, codebook, dtype)


def _linear(x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, average: bool = False) -> Tensor:
    """The reference, which serves devices that have no route of their own."""
    _check(codes, codebook, x, bias)
    return F.linear(x, _decode(codes, codebook, x.dtype), None if bias is None else bias.to(x.dtype)).contiguous()


def _linear_cpu(
    x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, average: bool = False
) -> Tensor:
    _check(codes, codebook, x, bias)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    y = pq_cpu.linear(rows, codes, codebook)
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], len(codes))


def _linear_cuda(
    x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, average: bool = False
) -> Tensor:
    _check(codes, codebook, x, bias)
    served = pq_cuda.serves(x.dtype, x, codes, codebook)
    return (pq_cuda.linear if served else _linear)(x, codes, codebook, bias)


def _embedding(
    ids: Tensor,
    codes: Tensor,
    codebook: Tensor,
    dtype: torch.dtype | None = None,
    padding_idx: int | None = None,
    average: bool = False,
) -> Tensor:
    _check(codes, codebook)
    return F.embedding(F.embedding(ids, codes).int(), codebook.to(dtype or codebook.dtype)).flatten(-2)


def _embedding_cuda(
    ids: Tensor,
    codes: Tensor,
    codebook: Tensor,
    dtype: torch.dtype | None = None,
    padding_idx: int | None = None,
    average: bool = False,
) -> Tensor:
    _check(codes, codebook)
    dtype = dtype or codebook.dtype
    served = pq_cuda.serves(dtype, ids, codes, codebook)
    return (pq_cuda.embedding if served else _embedding)(ids, codes, codebook, dtype)


def _input_grad_cuda(grad: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    served = pq_cuda.serves(grad.dtype, grad, codes, codebook)
    return (pq_cuda_grad if served else pq_grad).input_grad(grad, codes, codebook)


def _codebook_grad_cuda(grad: Tensor, x: Tensor, codes: Tensor, codebook: Tensor, average: bool) -> Tensor:
    served = pq_cuda.serves(grad.dtype, grad, x, codes, codebook) and grad.dtype == x.dtype
    return (pq_cuda_grad if served else pq_grad).codebook_grad(grad, x, codes, codebook, average)


def _segment_sum_cuda(grad: Tensor, picked: Tensor, codebook: Tensor, codes: Tensor | None) -> Tensor:
    served = pq_cuda.serves(grad.dtype, grad, picked, codebook)
    return (pq_cuda_grad if served else pq_grad).segment_sum(grad, picked, codebook, codes)


def _fake_linear(
    x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, average: bool = False
) -> Tensor:
    _check(codes, codebook, x, bias)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_input_grad(grad: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], codes.shape[1] * codebook.shape[1])


def _fake_codebook_grad(grad: Tensor, x: Tensor, codes: Tensor, codebook: Tensor, average: bool) -> Tensor:
    return torch.empty_like(codebook, memory_format=torch.contiguous_format)


def _fake_segment_sum(grad: Tensor, picked: Tensor, codebook: Tensor, codes: Tensor | None) -> Tensor:
    return torch.empty_like(codebook, memory_format=torch.contiguous_format)


def _setup_decode(ctx: Any, inputs: tuple, output: Tensor) -> None:
    codes, codebook, _, ctx.average = inputs
    ctx.save_for_backward(codes, codebook)


def _backward_decode(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebook = ctx.saved_tensors
    return None, OPS.pq_segment_sum(grad, codes, codebook, codes if ctx.average else None), None, None


def _setup_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, codes, codebook, bias, ctx.average = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, codes, codebook)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebook = ctx.saved_tensors
    needs = ctx.needs_input_grad  # ends with the last argument that is not its default
    to_x = OPS.pq_input_grad(grad, codes, codebook) if needs[0] else None
    to_codebook = OPS.pq_codebook_grad(grad, x, codes, codebook, ctx.average) if needs[2] else None
    sums = tuple(range(grad.ndim - 1))
    to_bias = (grad.sum(sums) if sums else grad).to(ctx.bias_dtype) if ctx.bias_dtype and needs[3] else None
    return to_x, None, to_codebook, to_bias, None


def _setup_embedding(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, codes, codebook, _, ctx.padding_idx, ctx.average = inputs
    ctx.save_for_backward(ids, codes, codebook)


def _backward_embedding(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, codes, codebook = ctx.saved_tensors
    if ctx.padding_idx is not None:
        grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0)
    picked = F.embedding(ids, codes)
    to_codebook = OPS.pq_segment_sum(grad, picked, codebook, codes if ctx.average else None)
    return None, None, to_codebook, None, None, None


_EMBEDDING = (
    "pq_embedding(Tensor ids, Tensor codes, Tensor codebook, ScalarType? dtype=None, int? padding_idx=None, "
    "bool average=False) -> Tensor"
)
register(
    "pq_decode(Tensor codes, Tensor codebook, ScalarType? dtype=None, bool average=False) -> Tensor",
    _decode,
    _decode,
    cpu=_decode_cpu,
    cuda=_decode_cuda,
    backward=_backward_decode,
    setup=_setup_decode,
)
register(
    "pq_linear(Tensor x, Tensor codes, Tensor codebook, Tensor? bias=None, bool average=False) -> Tensor",
    _linear,
    _fake_linear,
    cpu=_linear_cpu,
    cuda=_linear_cuda,
    backward=_backward_linear,
    setup=_setup_linear,
    casts=True,
)
register(
    _EMBEDDING,
    _embedding,
    _embedding,
    cuda=_embedding_cuda,
    backward=_backward_embedding,
    setup=_setup_embedding,
)
register(
    "pq_input_grad(Tensor grad, Tensor codes, Tensor codebook) -> Tensor",
    pq_grad.input_grad,
    _fake_input_grad,
    cuda=_input_grad_cuda,
)
register(
    "pq_codebook_grad(Tensor grad, Tensor x, Tensor codes, Tensor codebook, bool average) -> Tensor",
    pq_grad.codebook_grad,
    _fake_codebook_grad,
    cuda=_codebook_grad_cuda,
)
register(
    "pq_segment_sum(Tensor grad, Tensor picked, Tensor codebook, Tensor? codes) -> Tensor",
    pq_grad.segment_sum,
    _fake_segment_sum,
    cuda=_segment_sum_cuda,
)
