"""What every stand-in for a packed weight does while a model is traced.

A stand-in keeps its tensors as buffers of the layer, because a packed weight's own lie below an attribute that reads
as a decoded tensor, where torch.export does not find them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_qnoise.schemes import PackedWeight


@dataclass
class Shelf:
    """Where a stand-in keeps its tensors: buffers of a layer, behind a common prefix.

    Attributes:
        layer: The layer, which is in the traced model.
        prefix: What the buffers' names begin with.
        names: The buffers.
        narrow: Those of int8 or uint8 whose values fit into four bits.
    """

    layer: nn.Module
    prefix: str
    names: set[str] = field(default_factory=set)
    narrow: set[str] = field(default_factory=set)

    def put(self, name: str, tensor: Tensor, bits: int = 8) -> None:
        """Keep a tensor; integers of at most four bits will take half a byte."""
        self.layer.register_buffer(self.prefix + name, tensor)
        self.names.add(self.prefix + name)
        if bits <= 4:
            self.narrow.add(self.prefix + name)

    def get(self, name: str) -> Tensor:
        """Return a tensor as the layer holds it now: in a trace, the traced one."""
        return getattr(self.layer, self.prefix + name)


class GraphWeight(PackedWeight):
    """A packed weight in a graph. Its input is quantized by the arithmetic that torch does.

    Raises:
        ValueError: The activation cannot be exported.
    """

    def __init__(self, packed: PackedWeight, shelf: Shelf) -> None:
        super().__init__(packed.scheme, packed.shape, packed.dtype)
        self._buffers.clear()
        self.shelf = shelf
        activation = self.scheme.activation
        if activation is None:
            return
        if activation.mode == "static":
            if packed.input_scale.isnan():
                raise ValueError("its static activation has no range yet: call calibrate(model, loader) first")
            shelf.put("input_scale", packed.input_scale)
            shelf.put("input_zero_point", packed.input_zero_point)
        elif activation.range != "minmax":
            raise ValueError(
                f"its dynamic activation has range={activation.range!r}, which takes a search in every input; use "
                f"range='minmax' or mode='static'"
            )

    def input_grid(self, x: Tensor) -> tuple[Tensor, Tensor | int]:
        """Return scale and zero point of an input of the layer, float32, which broadcast to it."""
        if self.scheme.activation is not None and self.scheme.activation.mode == "static":
            return self.shelf.get("input_scale"), self.shelf.get("input_zero_point").float()
        return super().input_grid(x)
