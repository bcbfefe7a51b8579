"""`PackedWeight`: one compressed weight, the result of `Scheme.encode`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_qnoise.schemes.base import Scheme


class PackedWeight(nn.Module):
    """One compressed weight. Its buffers are the file format, and `nbytes` of them the reported size.

    A subclass registers its buffers in the constructor and implements `decode`. Moving it to another dtype changes
    `dtype`, that of the decoded weight, and leaves the stored buffers as they are.

    Attributes:
        scheme: The scheme that made it.
        shape: Shape of the decoded weight.
        dtype: Dtype of the decoded weight.
    """

    def __init__(self, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme = scheme
        self.shape = torch.Size(shape)
        self.dtype = dtype

    def decode(self) -> Tensor:
        """Return the weight, of `shape` and `dtype`."""
        raise NotImplementedError

    def follow(self, weight: Tensor, mask: Tensor) -> None:
        """Encode the masked blocks of a weight that has moved since, on the same grid. Called before `project`.

        Args:
            weight: Float weight of `shape`.
            mask: bool `[rows, cols // unit]`, see `Scheme.noise_blocks`.
        """

    def project(self, weight: Tensor) -> Tensor:
        """Return what quantization puts in the place of `weight` (the paper's phi), of the same shape and dtype."""
        return self.decode()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x @ decode().T + bias`, `[..., out]`."""
        return nn.functional.linear(x, self.decode(), bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows `ids`, `[*ids.shape, dim]`."""
        return nn.functional.embedding(ids, self.decode())

    def extra_repr(self) -> str:
        """Show scheme and shape in `print(model)`."""
        return f"{self.scheme}, shape={list(self.shape)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        def keep_dtype(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keep_dtype, recurse)
