"""Registers `int_linear` and `int_input_grad`. Each is the other's gradient, so that further derivatives exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qnoise.ops import int_linear_cuda, int_linear_slices
from lightning_qnoise.ops.int_matrix import IntMatrix
from lightning_qnoise.ops.library import OPS, register


def _matrix(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, n_out: int, n_in: int) -> IntMatrix:
    if codes.dtype != torch.uint8 or codes.ndim != 1 or not 2 <= bits <= 8:
        raise ValueError(f"expected codes of 2 to 8 bits, uint8 [n], got {bits} in {codes.dtype} {list(codes.shape)}")
    if len(codes) != (n_out * n_in * bits + 7) // 8:
        holds = f"{len(codes)} bytes hold {n_out} x {len(codes) * 8 // (n_out * bits or 1)} codes of {bits} bits"
        raise ValueError(f"{holds}, not {n_out} x {n_in}: an input is [..., in], and one scale for all wants `out`")
    fits = scale.ndim == 2 and (tuple(scale.shape) == (1, 1) or (scale.shape[0] == n_out and scale.shape[1] > 0))
    if scale.dtype != torch.float32 or not fits or n_in % scale.shape[1]:
        expected = f"float32 [1, 1] or [{n_out}, groups], of groups that divide {n_in}"
        raise ValueError(f"expected a scale {expected}, got {scale.dtype} {list(scale.shape)}")
    if zero_point is not None and (zero_point.dtype != torch.uint8 or zero_point.shape != scale.shape):
        got = f"{zero_point.dtype} {list(zero_point.shape)}"
        raise ValueError(f"expected a zero point uint8 {list(scale.shape)}, got {got}")
    return IntMatrix(codes.contiguous(), scale, zero_point, bits, n_out, n_in)


def _check(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int, out: int
) -> IntMatrix:
    if not x.ndim or not x.is_floating_point():
        raise ValueError(f"expected a float input [..., in], got {x.dtype} {list(x.shape)}")
    if bias is not None and (bias.shape != (out,) or not bias.is_floating_point()):
        raise ValueError(f"expected a float bias [{out}], got {bias.dtype} {list(bias.shape)}")
    return _matrix(codes, scale, zero_point, bits, out, x.shape[-1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _linear(x: Tensor, *args: Any) -> Tensor:
    """The reference; on a CPU, also the fast route."""
    matrix, bias = _check(x, *args), args[3]
    return int_linear_slices.linear(_rows(x), matrix, bias).view(*x.shape[:-1], matrix.n_out)


def _linear_cuda(x: Tensor, *args: Any) -> Tensor:
    matrix, bias = _check(x, *args), args[3]
    return int_linear_cuda.linear(_rows(x), matrix, bias).view(*x.shape[:-1], matrix.n_out)


def _fake_linear(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _check(x, *args).n_out)


def _input_grad(grad: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, n_in: int) -> Tensor:
    matrix = _matrix(codes, scale, zero_point, bits, grad.shape[-1], n_in)
    return int_linear_slices.input_grad(_rows(grad), matrix).view(*grad.shape[:-1], n_in)


def _fake_input_grad(
    grad: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, n_in: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], n_in)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Of both: the bits are the last but one."""
    x, codes, scale, zero_point, *_, ctx.bits, _ = inputs
    if ctx.needs_input_grad[2]:
        raise RuntimeError("int_linear has no gradient for its scale; detach it, or multiply with the decoded weight")
    ctx.n_in = x.shape[-1]
    ctx.save_for_backward(codes, scale, zero_point)


def _setup_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _setup(ctx, inputs, output)
    ctx.bias_dtype = None if inputs[4] is None else inputs[4].dtype


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs, sums = ctx.needs_input_grad, tuple(range(grad.ndim - 1))
    to_x = OPS.int_input_grad(grad, *ctx.saved_tensors, ctx.bits, ctx.n_in) if needs[0] else None
    to_bias = (grad.sum(sums) if sums else grad).to(ctx.bias_dtype) if ctx.bias_dtype and needs[4] else None
    return to_x, None, None, None, to_bias, None, None


def _backward_input_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return OPS.int_linear(grad, *ctx.saved_tensors, None, ctx.bits, ctx.n_in), None, None, None, None, None


register(
    "int_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, SymInt out)"
    " -> Tensor",
    _linear,
    _fake_linear,
    cuda=_linear_cuda,
    backward=_backward_linear,
    setup=_setup_linear,
    casts=(0, 4),
)
register(
    "int_input_grad(Tensor grad, Tensor codes, Tensor scale, Tensor? zero_point, int bits, SymInt n_in) -> Tensor",
    _input_grad,
    _fake_input_grad,
    backward=_backward_input_grad,
    setup=_setup,
)
