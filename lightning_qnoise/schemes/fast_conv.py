"""`FastConvolutions`: packed weights that keep what their convolutions ask for, by the shape of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qnoise.ops import (
    DenseKernel,
    Int8Kernel,
    Layout,
    dense_conv2d,
    dense_layout,
    is_zero,
    pixelwise_conv2d,
    prepare_dense_conv2d,
    unfolded_conv2d,
)
from lightning_qnoise.schemes.packed import PackedWeight
from lightning_qnoise.schemes.ranges import round_trip
from lightning_qnoise.schemes.recording import is_recorded

_MOST_ROUTES = 64  # that are remembered
Grid = tuple[Tensor, Tensor | int]


class Route(NamedTuple):
    """How inputs of one shape are convolved.

    Attributes:
        convolve: Takes an input, the bias, and the grid of the input, None where that is not quantized.
        kernel: What was packed for images of this size.
    """

    convolve: Callable[[Tensor, Tensor | None, Grid | None], Tensor]
    kernel: DenseKernel | Int8Kernel | None = None


class FastConvolutions(PackedWeight):
    """A packed weight that remembers how to convolve inputs of a shape, as every step shows in a small layer.

    What is packed for one size of images is dropped where another one is packed: so much memory, and no more.
    """

    def conv2d(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """Convolve on the fastest route for inputs of this shape; as torch does in a graph, autocast or calibration."""
        if self.observer is not None or is_recorded() or not x.numel() or torch.is_autocast_enabled("cpu"):
            return super().conv2d(x, layer)
        grid = None if self.scheme.activation is None else self.input_grid(x)
        if self.is_trained:  # an optimizer may move it before the next forward
            route = self.route_of(x, layer, grid)
        else:
            is_unsigned = grid is not None and is_zero(grid[1])
            key = x.shape, x.dtype, layer.stride, layer.padding, layer.dilation, is_unsigned
            route = self._made.get(key, self)
            if route is self:  # not found, as None is a route
                if len(self._made) > _MOST_ROUTES:
                    self.forget()
                route = self._made[key] = self.route_of(x, layer, grid)
        if route is None:
            return layer._conv_forward(_quantized(x, grid, self._bits), self.read(), layer.bias)
        return route.convolve(x, layer.bias, grid)

    def route_of(self, x: Tensor, layer: nn.Conv2d, grid: Grid | None) -> Route | None:
        """Return the route of an input without gradients; None decodes anew for every input."""
        if self.memory == "lean":
            return None
        geometry: Any = layer.stride, layer.padding, layer.dilation
        layout = self.layout_of(x, layer)
        if layout == "packed":
            kernel = prepare_dense_conv2d(self.decode(), x.shape, *geometry)
            self.drop_kernels(x.shape)
            return self._route(dense_conv2d, kernel, geometry)
        weight = self.read(torch.channels_last if layout == "channels-last" else torch.contiguous_format)
        if layout == "contiguous":
            return self._route(nn.functional.conv2d, weight, geometry)
        if layout == "pixelwise":
            return self._route(pixelwise_conv2d, weight, geometry[:1])
        return self._route(unfolded_conv2d, weight, geometry[:2])

    def layout_of(self, x: Tensor, layer: nn.Conv2d) -> Layout:
        """Return the layout of the float weight that is the fastest for an input."""
        geometry: Any = layer.stride, layer.padding, layer.dilation
        if x.is_cpu and x.dtype == self.dtype == torch.float32 and all(isinstance(value, tuple) for value in geometry):
            return dense_layout(x.shape, self.shape, *geometry)
        return "contiguous"

    def drop_kernels(self, sizes: torch.Size) -> None:
        """Let go of kernels for images of other sizes."""
        for key, route in list(self._made.items()):
            if isinstance(route, Route) and route.kernel is not None and route.kernel.sizes != sizes:
                self._made.pop(key, None)

    @property
    def _bits(self) -> int:
        return 0 if self.scheme.activation is None else self.scheme.activation.bits

    def _route(self, convolve: Callable[..., Tensor], weight: Tensor | DenseKernel, geometry: tuple[Any, ...]) -> Route:
        """The route that quantizes an input and convolves it with a weight in floats."""
        bits = self._bits  # and not self, which would keep the packed weight alive

        def run(x: Tensor, bias: Tensor | None, grid: Grid | None) -> Tensor:
            return convolve(_quantized(x, grid, bits), weight, bias, *geometry)

        return Route(run, weight if isinstance(weight, DenseKernel) else None)


def _quantized(x: Tensor, grid: Grid | None, bits: int) -> Tensor:
    return x if grid is None else round_trip(x, *grid, bits)
