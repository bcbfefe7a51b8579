"""Packed Embedding: only the rows that are asked for need decoding."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_qnoise.layers.base import PackedLayer, packs


@packs(nn.Embedding)
class PackedEmbedding(PackedLayer):
    """`nn.Embedding` whose table is packed. A padding row of zeros stays zero under every scheme of the package."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows `input`, `[*input.shape, embedding_dim]`."""
        return self.packed("weight").embedding(input)
