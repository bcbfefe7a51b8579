"""`Scheme`: how one weight becomes small. With `PackedWeight` it is all that the rest of the package knows of one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_qnoise.schemes.packed import PackedWeight

if TYPE_CHECKING:
    from lightning_qnoise.schemes.integer import Int


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


class Scheme(ABC):
    """How one weight becomes small: mathematics only, no state.

    A subclass is a frozen dataclass; it is registered by its class name, which is its name in JSON.

    Attributes:
        activation: How what enters the layer is quantized, if at all.
    """

    registry: ClassVar[dict[str, type[Scheme]]] = {}
    activation: Int | None = None

    def __init_subclass__(cls) -> None:
        Scheme.registry[cls.__name__] = cls

    @property
    def needs_inputs(self) -> bool:
        """Whether `encode` wants the second moment of the layer's inputs."""
        return False

    @abstractmethod
    def encode(self, weight: Tensor, start: PackedWeight | None = None, moment: Tensor | None = None) -> PackedWeight:
        """Compress a weight.

        Args:
            weight: Finite float weight with two or more dimensions.
            start: An earlier encoding of the same weight, to go on from where that helps.
            moment: Mean of `x x^T` over the inputs of the layer, float32 `[cols, cols]` (`[groups, cols, cols]` of a
                grouped convolution); only schemes that need inputs look at it.

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
