"""Registers the operators of `pq`: `Library.define` and `impl` cost less per call than `torch.library.custom_op`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qnoise.ops import pq_cpu, pq_grad

_SCHEMAS = [
    "pq_decode(Tensor codes, Tensor codebook, ScalarType? dtype=None, bool average=False) -> Tensor",
    "pq_linear(Tensor x, Tensor codes, Tensor codebook, Tensor? bias=None, bool average=False) -> Tensor",
    "pq_embedding(Tensor ids, Tensor codes, Tensor codebook, ScalarType? dtype=None, int? padding_idx=None, "
    "bool average=False) -> Tensor",
    "pq_input_grad(Tensor grad, Tensor codes, Tensor codebook) -> Tensor",
    "pq_codebook_grad(Tensor grad, Tensor x, Tensor codes, Tensor codebook, bool average) -> Tensor",
    "pq_segment_sum(Tensor grad, Tensor picked, Tensor codebook, Tensor? codes) -> Tensor",
]
_LIBRARY = torch.library.Library("lightning_qnoise", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
_OPS = torch.ops.lightning_qnoise


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
    return None, _OPS.pq_segment_sum(grad, codes, codebook, codes if ctx.average else None), None, None


def _setup_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, codes, codebook, bias, ctx.average = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, codes, codebook)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebook = ctx.saved_tensors
    needs = ctx.needs_input_grad  # ends with the last argument that is not its default
    to_x = _OPS.pq_input_grad(grad, codes, codebook) if needs[0] else None
    to_codebook = _OPS.pq_codebook_grad(grad, x, codes, codebook, ctx.average) if needs[2] else None
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
    to_codebook = _OPS.pq_segment_sum(grad, picked, codebook, codes if ctx.average else None)
    return None, None, to_codebook, None, None, None


def _no_second(ctx: Any, grad: Tensor) -> NoReturn:
    raise RuntimeError("the operators on a product-quantized matrix have no second derivative")


def _without_autocast(name: str, device_type: str, casts: bool) -> Callable[..., Tensor]:
    """Return what runs under autocast: as `F.linear` does, it casts, then computes as it is told."""

    def cast(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(device_type)) if fits else value

    def run(*args: Any) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return getattr(_OPS, name)(*map(cast, args) if casts else args)

    return run


def _register() -> None:
    kernels: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "pq_decode": (_decode, _decode),
        "pq_linear": (_linear, _fake_linear),
        "pq_embedding": (_embedding, _embedding),
        "pq_input_grad": (pq_grad.input_grad, _fake_input_grad),
        "pq_codebook_grad": (pq_grad.codebook_grad, _fake_codebook_grad),
        "pq_segment_sum": (pq_grad.segment_sum, _fake_segment_sum),
    }
    backwards = {
        "pq_decode": (_backward_decode, _setup_decode),
        "pq_linear": (_backward_linear, _setup_linear),
        "pq_embedding": (_backward_embedding, _setup_embedding),
    }
    for name, (kernel, fake) in kernels.items():
        full, (backward, setup) = f"lightning_qnoise::{name}", backwards.get(name, (_no_second, None))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(full, fake, lib=_LIBRARY)
        torch.library.register_autograd(full, backward, setup_context=setup, lib=_LIBRARY)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, _without_autocast(name, key.lower(), name == "pq_linear"), f"Autocast{key}")
    _LIBRARY.impl("pq_decode", _decode_cpu, "CPU")
    _LIBRARY.impl("pq_linear", _linear_cpu, "CPU")


_register()
