"""Registers the operators of `fake_quant_noise`: the routes of GPUs, and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qnoise.ops.library import OPS, register
from lightning_qnoise.ops.noise_reference import check, clamped, noise, noise_grad


def _cuda(weight: Tensor, *args: Any) -> Tensor:
    check(weight, *args)
    if weight.dtype == torch.float64:  # no kernel reads it
        return noise(weight, *args)
    from lightning_qnoise.kernels.integer_noise import integer_noise
    from lightning_qnoise.kernels.noise import block_noise

    seed, rate, unit, scale, zero_point, bits, codes, table, clamp = args
    matrix = _matrix(weight)
    if scale is not None:
        found = integer_noise(matrix, seed, rate, scale.contiguous(), _contiguous(zero_point), bits, clamp)
    else:
        found = block_noise(matrix, seed, rate, unit, _contiguous(codes), _contiguous(table))
    return _like(found, weight)


def _grad_cuda(grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    if weight.dtype == torch.float64:
        return noise_grad(grad, weight, scale, zero_point, bits)
    from lightning_qnoise.kernels.integer_noise import integer_grad

    found = integer_grad(_matrix(grad), _matrix(weight), scale.contiguous(), _contiguous(zero_point), bits)
    return _like(found, weight)


def _matrix(weight: Tensor) -> Tensor:
    """Contiguous `[rows, cols]`, what a kernel reads; a copy where the weight is channels-last."""
    return weight.reshape(weight.shape[0], weight.shape[1:].numel()).contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _like(matrix: Tensor, weight: Tensor) -> Tensor:
    """The matrix in shape and strides of the weight."""
    found = matrix.view(weight.shape)
    return found if weight.is_contiguous() else torch.empty_like(weight).copy_(found)


def under_func(weight: Tensor, *args: Any) -> Tensor:
    """The operator within `torch.func`, which does not see the gradients that operators register."""
    _, _, _, scale, zero_point, bits, _, _, clamp = args
    check(weight, *args)
    if clamp:
        weight = clamped(weight, scale, zero_point, bits)
    value = weight.detach()
    return weight - value + OPS.fake_quant_noise(value, *args[:-1], False)


def _fake(weight: Tensor, *args: Any) -> Tensor:
    check(weight, *args)
    return torch.empty_like(weight)


def _fake_grad(grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    return torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, _, _, _, scale, zero_point, ctx.bits, _, _, ctx.clamp = inputs
    if ctx.clamp:
        ctx.save_for_backward(weight, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.clamp:
        grad = OPS.fake_quant_noise_grad(grad, *ctx.saved_tensors, ctx.bits)
    return grad, *[None] * 9


register(
    "fake_quant_noise(Tensor weight, Tensor seed, Tensor rate, int unit, Tensor? scale, Tensor? zero_point, int bits, "
    "Tensor? codes, Tensor? table, bool clamp) -> Tensor",
    noise,
    _fake,
    cuda=_cuda,
    backward=_backward,
    setup=_setup,
)
register(
    "fake_quant_noise_grad(Tensor grad, Tensor weight, Tensor scale, Tensor? zero_point, int bits) -> Tensor",
    noise_grad,
    _fake_grad,
    cuda=_grad_cuda,
)
