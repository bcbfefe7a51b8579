"""Packed convolutions: the user's own, with its input quantized where the scheme says so."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_qnoise.layers.base import PackedLayer, packs


@packs(nn.Conv1d)
@packs(nn.Conv2d)
@packs(nn.Conv3d)
@packs(nn.ConvTranspose1d)
@packs(nn.ConvTranspose2d)
@packs(nn.ConvTranspose3d)
class PackedConv(PackedLayer):
    """A convolution whose weight is packed."""

    quantizes_input = True

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the convolution returns, with the decoded weight."""
        return super().forward(self.packed("weight").quantize_input(input), *args, **kwargs)
