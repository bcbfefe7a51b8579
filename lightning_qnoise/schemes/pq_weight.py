"""`PQWeight`: codes and codebook of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qnoise.ops import pq_decode, pq_embedding, pq_linear
from lightning_qnoise.schemes.base import matrix_shape
from lightning_qnoise.schemes.bits import pack_bits, unpack_bits
from lightning_qnoise.schemes.int_weight import IntWeight
from lightning_qnoise.schemes.kmeans import nearest
from lightning_qnoise.schemes.pq_codebook import CodebookWeight

if TYPE_CHECKING:
    from lightning_qnoise.schemes.product import PQ


class PQWeight(CodebookWeight):
    """Codes and codebook of one weight.

    Attributes:
        codes: uint8 `[ceil(n_blocks * bits / 8)]`, the blocks of row 0 first; one byte a block for K = 256.
    """

    codes: Tensor

    def __init__(
        self, scheme: PQ, shape: Sequence[int], dtype: torch.dtype, codes: Tensor, codebook: Tensor | IntWeight
    ) -> None:
        super().__init__(scheme, shape, dtype, codes.device)
        self.register_buffer("codes", codes)
        self._hold(codebook)

    def indices(self) -> Tensor:
        """Return the codes, one a block: `[rows, cols // block_size]`, uint8, or int16 or int32 for K > 256.

        They may be the stored ones and are not to be written to.
        """
        rows, _ = matrix_shape(self.shape)
        if self.scheme.bits == 8:
            return self.codes.view(rows, -1)
        if torch.compiler.is_compiling():
            return self._unpacked().view(rows, -1)
        if "codes" not in self._made:
            with torch.inference_mode(False):  # a forward with gradients will read them, too
                self._made["codes"] = self._unpacked()
        return self._made["codes"].view(rows, -1)

    def write_codes(self, indices: Tensor) -> None:
        """Take other codes, of any shape, row by row."""
        self.forget()
        self.codes.copy_(pack_bits(indices.flatten(), self.scheme.bits))

    def decode(self) -> Tensor:
        """Look every block up in the codebook."""
        return pq_decode(self.indices(), self._table(), self.dtype, self.average).view(self.shape)

    def linear_in_floats(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `quantize_input(x) @ decode().T + bias`, `[..., out]`, without the whole weight in memory."""
        if self.memory == "fast" and not torch.is_grad_enabled():
            return super().linear_in_floats(x, bias)
        return pq_linear(self.quantize_input(x), self.indices(), self._table(self.dtype), bias, self.average)

    @property
    def is_int8(self) -> bool:
        """With integer codewords of one scale, and where a byte an element may be kept."""
        return isinstance(self.codebook, IntWeight) and self.codebook.scale.numel() == 1 and self.memory == "fast"

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Return the integers of the codewords in the place of the codes."""
        assert isinstance(self.codebook, IntWeight)
        codewords, scale, zero_point, bits = self.codebook.integers()
        return codewords[self.indices().long()].view(self.shape), scale, zero_point, bits

    def embedding(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """Decode only the rows that are asked for, unless all are there."""
        if self.memory == "fast":
            return super().embedding(ids, padding_idx)
        return pq_embedding(ids, self.indices(), self._table(), self.dtype, padding_idx, self.average)

    @torch.no_grad()
    def follow(self, weight: Tensor, mask: Tensor) -> None:
        """Assign the masked blocks to their nearest codewords; the codebook stays."""
        moved = mask.flatten().nonzero().flatten()
        blocks = weight.detach().reshape(-1, self.scheme.block_size)[moved]
        codes = self.indices().flatten().long()  # a copy
        codes[moved] = nearest(blocks, self.codewords())
        self.write_codes(codes)

    def noise_arguments(self, weight: Tensor) -> dict[str, Any]:
        """Return codes and codebook."""
        return {"codes": self.indices(), "table": self._table()}

    def _unpacked(self) -> Tensor:
        k, n_blocks = self.scheme.n_centroids, self.shape.numel() // self.scheme.block_size
        dtype = torch.uint8 if k <= 2**8 else torch.int16 if k <= 2**15 else torch.int32
        return unpack_bits(self.codes, self.scheme.bits, n_blocks).to(dtype)
