"""Packed Linear: the whole product goes to the packed weight."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_qnoise.layers.base import PackedLayer, packs


@packs(nn.Linear)
class PackedLinear(PackedLayer):
    """`nn.Linear` whose weight is packed."""

    quantizes_input = True
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`, `[..., out_features]`."""
        return self.packed("weight").linear(input, self.bias)
