"""Packed Linear: the whole product goes to the packed weight."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lightning_qnoise.layers.arguments import on_rows
from lightning_qnoise.layers.base import PackedLayer, packs


@packs(nn.Linear)
class PackedLinear(PackedLayer):
    """`nn.Linear` whose weight is packed."""

    inputs: ClassVar = {"weight": ("input",)}
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`, `[..., out_features]`."""
        if input.is_nested:  # which TransformerEncoder makes of padded sequences
            return on_rows(self.forward, input)
        return self.packed("weight").linear(input, self.bias)
