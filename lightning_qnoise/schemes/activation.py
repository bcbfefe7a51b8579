"""Quantizing what enters a layer: the grid of integers that one input is put on."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qnoise.schemes.ranges import affine_grid, find_range
from lightning_qnoise.schemes.recording import is_transformed

if TYPE_CHECKING:
    from lightning_qnoise.schemes.integer import Int


def check_activation(scheme: str, activation: Int | None) -> None:
    """Raise a ValueError unless `activation` can quantize the input of a layer."""
    if activation is None:
        return
    if activation.activation is not None:
        raise ValueError(f"{scheme}: an activation has no activation of its own, got {activation}")
    if activation.granularity != "channel" or activation.rounding != "nearest":
        raise ValueError(f"{scheme}: an activation is quantized per='tensor' or 'token', to the nearest level")
    if activation.mode == "static" and activation.per == "token":
        raise ValueError(f"{scheme}: a static activation has one range, use per='tensor', or mode='dynamic'")
    if activation.range == "lsq":
        raise ValueError(f"{scheme}: range='lsq' is learned with a weight; an activation can have range='mse'")
    if activation.mode != "static" and activation.range == "ema":
        raise ValueError(f"{scheme}: range='ema' averages over batches, which only mode='static' does")


def dynamic_grid(x: Tensor, activation: Int, weight_shape: Sequence[int]) -> tuple[Tensor, Tensor | int]:
    """Return scale and zero point for an input, from that input alone.

    Args:
        x: Float, `[..., in]` of a linear layer, `[..., channels, *space]` of a convolution; not empty.
        activation: Its scheme. Per `"token"` is per vector of a linear layer and per sample of a convolution.
        weight_shape: The shape of the layer's weight.

    Returns:
        Scale and zero point, float32, which broadcast to `x`; the zero point is a number where it is fixed, and in the
        memory of the host where the whole of `x` has one, or where no input is negative.
    """
    n_own = min(max(1, len(weight_shape) - 1), x.ndim) if activation.per_token else x.ndim
    shared = x.shape[: x.ndim - n_own]
    if _is_at_hand(x) and activation.range == "minmax" and shared.numel() == 1:
        found = _host_grid(x.detach().float(), activation)
        if found is not None:
            return found
    values = x.detach().float().reshape(*shared, -1)
    low, high = find_range(values, activation.bits, activation.symmetric, activation.range)
    zero_point: Tensor | int
    if activation.symmetric:
        scale, zero_point = affine_grid(low, high, activation.bits, True)[0], 2 ** (activation.bits - 1)
    elif _is_at_hand(x) and not low.any():
        scale, zero_point = high.div_(2**activation.bits - 1).clamp_(min=torch.finfo(torch.float32).tiny), 0
    else:  # the same in half the passes, which count where every input has them
        scale = (high - low).div_(2**activation.bits - 1).clamp_(min=torch.finfo(torch.float32).tiny)
        zero_point = low.div_(scale).round_().neg_()
    shape = (*shared, *[1] * n_own) if shared else ()
    return scale.view(shape), zero_point.view(shape) if isinstance(zero_point, Tensor) else zero_point


def _host_grid(x: Tensor, activation: Int) -> tuple[Tensor, int] | None:
    """The grid of a whole input, the same to the bit with fewer operators; None if it is not finite."""
    low, high = torch.aminmax(x)
    least, largest = min(low.item(), 0.0), max(high.item(), 0.0)
    if not math.isfinite(largest - least):
        return None
    levels = 2**activation.bits - 1
    if activation.symmetric:
        span = 2 * max(largest, -least) * levels / (levels - 1)
        return low.fill_(_single(span / levels) or 1.0), 2 ** (activation.bits - 1)
    step = max(_single(_single(largest - least) / levels), torch.finfo(torch.float32).tiny)
    return low.fill_(step), round(_single(-least / step))


def _is_at_hand(x: Tensor) -> bool:
    """Whether numbers can be read out of it, without a wait and without becoming constants of a graph."""
    return x.is_cpu and not is_transformed()


def _single(value: float) -> float:
    """A number as float32 holds it."""
    return ctypes.c_float(value).value
