"""Quantizing what enters a layer: the grid of integers that one input is put on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qnoise.schemes.ranges import affine_grid, find_range

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


def dynamic_grid(x: Tensor, activation: Int, weight_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return scale and zero point for an input, from that input alone.

    Args:
        x: Float, `[..., in]` of a linear layer, `[..., channels, *space]` of a convolution; not empty.
        activation: Its scheme. Per `"token"` is per vector of a linear layer and per sample of a convolution.
        weight_shape: The shape of the layer's weight.

    Returns:
        Scale and zero point, float32, which broadcast to `x`.
    """
    n_own = min(max(1, len(weight_shape) - 1), x.ndim) if activation.per_token else x.ndim
    shared = x.shape[: x.ndim - n_own]
    values = x.detach().float().reshape(*shared, -1)
    low, high = find_range(values, activation.bits, activation.symmetric, activation.range)
    if activation.symmetric:
        scale, zero_point = affine_grid(low, high, activation.bits, True)
    else:  # the same in half the passes, which count where every input has them
        levels = 2**activation.bits - 1
        scale = (high / levels).sub_(low / levels).clamp_(min=torch.finfo(torch.float32).tiny)
        zero_point = low.div(scale).neg_().round_()
    shape = (*shared, *[1] * n_own) if shared else ()
    return scale.view(shape), zero_point.view(shape)
