"""Packed Embedding: only the rows that are asked for need decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_qnoise.layers.base import PackedLayer, packs


@packs(nn.Embedding)
class PackedEmbedding(PackedLayer):
    """`nn.Embedding` whose table is packed. A padding row of zeros stays zero under every scheme of the package."""

    padding_idx: int | None
    scale_grad_by_freq: bool

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows `input`, `[*input.shape, embedding_dim]`."""
        if self.scale_grad_by_freq and torch.is_grad_enabled():
            return super().forward(input)  # the gradient of a row depends on all of the batch
        return self.packed("weight").embedding(input, self.padding_idx)
