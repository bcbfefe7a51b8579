"""`PQ`, product quantization: rows are cut into blocks, and every block is replaced by one of K codewords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_qnoise.schemes.activation import check_activation
from lightning_qnoise.schemes.base import Scheme, matrix_shape
from lightning_qnoise.schemes.bits import packed_length
from lightning_qnoise.schemes.integer import Int
from lightning_qnoise.schemes.kmeans import kmeans, nearest
from lightning_qnoise.schemes.packed import PackedWeight
from lightning_qnoise.schemes.pq_weight import PQWeight


@dataclass(frozen=True)
class PQ(Scheme):
    """Product quantization with one codebook per weight (Jegou et al. 2011; Stock et al., "And the Bit Goes Down").

    The weight is read as a matrix `[shape[0], prod(shape[1:])]`, so that a block is `block_size` consecutive inputs
    of one output: a whole 3x3 kernel of a convolution for `block_size=9`. A weight of `n` blocks takes
    `ceil(n * ceil(log2 K) / 8)` bytes of codes and `K * block_size` codebook values. A block of zeros (a padding row,
    pruned weights) keeps a codeword of its own and stays exactly zero.

    Args:
        block_size: Elements per block; must divide the number of columns.
        n_centroids: Codewords K, 2 to 65,536.
        codebook_dtype: Stored dtype of the codebook. Decoding is exact to its rounding.
        n_iter: Most k-means iterations.
        seed: Seed of k-means.
        codebook: A scheme for the codebook instead, `Int(8, granularity="tensor")`, or None.
        activation: The scheme of what enters the layer, as in `Int`, or None.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> packed = PQ(block_size=8, n_centroids=16).encode(torch.randn(32, 64))
        >>> packed.decode().shape, packed.codes.shape, packed.codebook.dtype
        (torch.Size([32, 64]), torch.Size([128]), torch.float16)
    """

    block_size: int = 8
    n_centroids: int = 256
    codebook_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    n_iter: int = 20
    seed: int = 0
    codebook: Int | None = None
    activation: Int | None = None

    def __post_init__(self) -> None:
        for name in ("codebook", "activation"):
            value = getattr(self, name)
            if isinstance(value, Mapping):  # from JSON
                object.__setattr__(self, name, Int(**value))
            elif not isinstance(value, Int | None):
                raise ValueError(f"PQ expects {name} to be an Int or None, got {value!r}")
        if self.block_size < 1:
            raise ValueError(f"PQ expects block_size >= 1, got {self.block_size}")
        if not 2 <= self.n_centroids <= 65536:
            raise ValueError(f"PQ expects n_centroids from 2 to 65536, got {self.n_centroids}")
        if self.codebook_dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"PQ expects codebook_dtype float16, bfloat16 or float32, got {self.codebook_dtype!r}")
        if self.n_iter < 1:
            raise ValueError(f"PQ expects n_iter >= 1, got {self.n_iter}")
        if self.codebook is not None:
            if self.codebook.activation is not None or self.codebook.needs_inputs:
                raise ValueError(f"PQ expects a codebook of plain integers such as Int(8), got {self.codebook}")
            self.codebook.noise_blocks((self.n_centroids, self.block_size))
        check_activation("PQ", self.activation)

    def __str__(self) -> str:
        parts = {"codebook": self.codebook, "activation": self.activation}
        integers = "".join(f", {name}=Int(bits={part.bits})" for name, part in parts.items() if part)
        return f"PQ(block_size={self.block_size}, n_centroids={self.n_centroids}{integers})"

    @property
    def bits(self) -> int:
        """Bits per code, `ceil(log2 K)`."""
        return (self.n_centroids - 1).bit_length()

    def noise_blocks(self, shape: Sequence[int]) -> tuple[int, int]:
        """One row by `block_size` columns."""
        _, cols = matrix_shape(shape)
        if cols % self.block_size:
            divisors = [d for d in range(2, min(cols, 65)) if cols % d == 0]
            remedy = f"pick one of {divisors}" if divisors else "there is no small divisor"
            raise ValueError(
                f"PQ(block_size={self.block_size}) cannot cut rows of {cols} elements (shape {list(shape)}) into "
                f"blocks; {remedy}"
            )
        return 1, self.block_size

    def adapt(self, shape: Sequence[int]) -> PQ:
        """Reduce K to the number of blocks where there are fewer blocks than codewords."""
        n_blocks = self._n_blocks(shape)
        if n_blocks < 2:
            raise ValueError(f"PQ cannot compress shape {list(shape)}: it has only {n_blocks} block")
        return self if n_blocks >= self.n_centroids else replace(self, n_centroids=n_blocks)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> PQWeight:
        """Return the packed weight's shapes and dtypes without data."""
        codes = torch.empty(packed_length(self._n_blocks(shape), self.bits), dtype=torch.uint8, device=device)
        size, stored = (self.n_centroids, self.block_size), getattr(torch, self.codebook_dtype)
        if self.codebook is not None:
            return PQWeight(self, shape, dtype, codes, self.codebook.empty(size, device=device))
        return PQWeight(self, shape, dtype, codes, torch.empty(size, dtype=stored, device=device))

    def encode(self, weight: Tensor, start: PackedWeight | None = None, moment: Tensor | None = None) -> PQWeight:
        """Cluster the blocks with k-means, from the codebook of `start` where given."""
        blocks = self._blocks(weight)
        stored = getattr(torch, self.codebook_dtype)
        if blocks.abs().max() > torch.finfo(stored).max:
            raise ValueError(f"weights up to {blocks.abs().max():.3g} overflow a {self.codebook_dtype} codebook")
        init = start.codewords() if isinstance(start, PQWeight) else None
        found = self._codebook(blocks, init)
        packed = self.empty(weight.shape, weight.dtype, weight.device)
        packed.write_codebook(nn.functional.pad(found, (0, 0, 0, self.n_centroids - len(found))))
        packed.write_codes(nearest(blocks, packed.codewords()[: len(found)]))
        return packed

    def _codebook(self, blocks: Tensor, init: Tensor | None) -> Tensor:
        """Codewords `[<= K, block_size]` fp32; the first is zero where the weight holds blocks of zeros."""
        zero = ~blocks.any(dim=1)
        if not zero.any():
            return kmeans(blocks, self.n_centroids, n_iter=self.n_iter, seed=self.seed, init=init)
        origin = blocks.new_zeros(1, self.block_size)
        if zero.all():
            return origin
        rest = None if init is None else init[1:]
        found = kmeans(blocks[~zero], self.n_centroids - 1, n_iter=self.n_iter, seed=self.seed, init=rest)
        return torch.cat([origin, found])

    def _n_blocks(self, shape: Sequence[int]) -> int:
        rows, cols = matrix_shape(shape)
        return rows * cols // self.noise_blocks(shape)[1]

    def _blocks(self, weight: Tensor) -> Tensor:
        self.noise_blocks(weight.shape)
        return weight.detach().reshape(-1, self.block_size).float()  # [n_blocks, block_size]
