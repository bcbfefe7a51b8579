"""Packed convolutions: the user's own, with its input quantized where the scheme says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_qnoise.layers.base import PackedLayer, packs


@packs(nn.Conv1d)
@packs(nn.Conv3d)
@packs(nn.ConvTranspose1d)
@packs(nn.ConvTranspose2d)
@packs(nn.ConvTranspose3d)
class PackedConv(PackedLayer):
    """A convolution whose weight is packed."""

    inputs: ClassVar = {"weight": ("input",)}

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the convolution returns, with the decoded weight."""
        return super().forward(self.packed("weight").quantize_input(input), *args, **kwargs)


@packs(nn.Conv2d)
class PackedConv2d(PackedConv):
    """A convolution of images, which may run in integers."""

    _conv_forward: Callable[..., Tensor]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the convolution returns; the packed weight convolves, if the layer is no special one."""
        is_own = type(self)._conv_forward is not nn.Conv2d._conv_forward
        if is_own or self.groups != 1 or self.padding_mode != "zeros" or input.ndim != 4:
            return super().forward(input, *args, **kwargs)
        return self.packed("weight").conv2d(input, cast(nn.Conv2d, self))
