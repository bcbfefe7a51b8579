"""`PQWeight`: codes and codebook of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qnoise.ops import pq_decode, pq_embedding, pq_linear
from lightning_qnoise.schemes.base import matrix_shape
from lightning_qnoise.schemes.bits import pack_bits, unpack_bits
from lightning_qnoise.schemes.int_weight import IntWeight
from lightning_qnoise.schemes.kmeans import nearest
from lightning_qnoise.schemes.packed import PackedWeight

if TYPE_CHECKING:
    from lightning_qnoise.schemes.product import PQ


class PQWeight(PackedWeight):
    """Codes and codebook of one weight.

    Attributes:
        codes: uint8 `[ceil(n_blocks * bits / 8)]`, the blocks of row 0 first; one byte a block for K = 256.
        codebook: `[n_centroids, block_size]` in the scheme's `codebook_dtype`, or an `IntWeight` of that shape.
    """

    scheme: PQ
    codes: Tensor
    codebook: Tensor | IntWeight

    def __init__(
        self, scheme: PQ, shape: Sequence[int], dtype: torch.dtype, codes: Tensor, codebook: Tensor | IntWeight
    ) -> None:
        super().__init__(scheme, shape, dtype, codes.device)
        self.register_buffer("codes", codes)
        if isinstance(codebook, IntWeight):
            self.codebook = codebook
        else:
            self.register_buffer("codebook", codebook)

    def indices(self) -> Tensor:
        """Return the codes, one a block: int32 `[rows, cols // block_size]`."""
        rows, cols = matrix_shape(self.shape)
        n_blocks = rows * cols // self.scheme.block_size
        return unpack_bits(self.codes, self.scheme.bits, n_blocks).view(rows, -1)

    def codewords(self) -> Tensor:
        """Return the codebook as it decodes, float32 `[n_centroids, block_size]`."""
        return (self.codebook.decode() if isinstance(self.codebook, IntWeight) else self.codebook).float()

    def write_codes(self, indices: Tensor) -> None:
        """Take other codes, of any shape, row by row."""
        self.forget()
        self.codes.copy_(pack_bits(indices.flatten(), self.scheme.bits))

    def write_codebook(self, codewords: Tensor) -> None:
        """Take other codewords `[n_centroids, block_size]`."""
        self.forget()
        if isinstance(self.codebook, IntWeight):
            self.codebook.load_state_dict(self.codebook.scheme.encode(codewords.detach().float()).state_dict())
        else:
            self.codebook.copy_(codewords.detach())

    def decode(self) -> Tensor:
        """Look every block up in the codebook."""
        return pq_decode(self.indices(), self._table(), self.dtype).view(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `quantize_input(x) @ decode().T + bias`, `[..., out]`, without the whole weight in memory."""
        if self.memory == "fast" and not torch.is_grad_enabled():
            return super().linear(x, bias)
        return pq_linear(self.quantize_input(x), self.indices(), self._table().to(self.dtype), bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Decode only the rows that are asked for, unless all are there."""
        if self.memory == "fast":
            return super().embedding(ids)
        return pq_embedding(ids, self.indices(), self._table(), self.dtype)

    @torch.no_grad()
    def follow(self, weight: Tensor, mask: Tensor) -> None:
        """Assign the masked blocks to their nearest codewords; the codebook stays."""
        moved = mask.flatten().nonzero().flatten()
        blocks = weight.detach().reshape(-1, self.scheme.block_size)[moved]
        codes = self.indices().flatten()
        codes[moved] = nearest(blocks, self.codewords()).int()
        self.write_codes(codes)

    def _table(self) -> Tensor:
        return self.codebook.decode() if isinstance(self.codebook, IntWeight) else self.codebook
