"""The two interfaces that everything else speaks: `Scheme`, how one weight becomes small, and `PackedWeight`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns that schemes see: the first dimension, and all others flattened in row-major order.

    Raises:
        ValueError: The weight has fewer than two dimensions.

    Example:
        >>> matrix_shape((64, 32, 3, 3))
        (64, 288)
    """
    if len(shape) < 2:
        raise ValueError(f"a weight of shape {list(shape)} has fewer than two dimensions; keep it float")
    return shape[0], math.prod(shape[1:])


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


class Scheme(ABC):
    """How one weight becomes small: mathematics only, no state.

    A subclass is a frozen dataclass; it is registered by its class name, which is its name in JSON.
    """

    registry: ClassVar[dict[str, type[Scheme]]] = {}

    def __init_subclass__(cls) -> None:
        Scheme.registry[cls.__name__] = cls

    @abstractmethod
    def encode(self, weight: Tensor, start: PackedWeight | None = None) -> PackedWeight:
        """Compress a weight.

        Args:
            weight: Finite float weight with two or more dimensions.
            start: An earlier encoding of the same weight, to go on from where that helps.

        Raises:
            ValueError: The weight cannot be taken by this scheme.
        """

    @abstractmethod
    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> PackedWeight:
        """Return a packed weight with the right shapes and dtypes and no data (also on `meta`).

        Raises:
            ValueError: A weight of that shape cannot be taken by this scheme.
        """

    @abstractmethod
    def noise_blocks(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return rows and columns of the unit that is distorted together, in the matrix view of the weight.

        Raises:
            ValueError: A weight of that shape cannot be cut into such units.
        """

    def adapt(self, shape: Sequence[int]) -> Scheme:
        """Return this scheme as a weight of that shape can take it.

        Raises:
            ValueError: A weight of that shape cannot be taken by this scheme.
        """
        self.noise_blocks(shape)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the plain data that `Scheme.from_dict` reads."""
        return {"scheme": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Scheme:
        """Build a scheme from plain data.

        Raises:
            ValueError: The name or a field is unknown.

        Example:
            >>> Scheme.from_dict({"scheme": "Int", "bits": 4}).bits
            4
        """
        fields = dict(data)
        name = fields.pop("scheme", None)
        if name not in Scheme.registry:
            raise ValueError(f"unknown scheme {name!r}; known are {', '.join(sorted(Scheme.registry))}")
        try:
            return Scheme.registry[name](**fields)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error
