"""`FastConvolutions`: packed weights that keep what their convolutions ask for, by the shape of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qnoise.ops import DenseKernel, dense_conv2d, dense_layout, prepare_dense_conv2d
from lightning_qnoise.schemes.packed import PackedWeight, is_recorded

_MOST_ROUTES = 64  # that are remembered


class FastConvolutions(PackedWeight):
    """A packed weight that finds the way to convolve inputs of a shape once, as every step shows in a small layer.

    A route is a layout of the decoded weight, or a kernel; there are kernels for one size of images at a time.
    """

    def conv2d(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """Convolve on the fastest route for inputs of this shape; on torch's own where that is recorded."""
        if self.observer is not None or is_recorded() or torch.is_autocast_enabled("cpu"):
            return super().conv2d(x, layer)
        if self.is_trained:  # an optimizer may move it before the next forward
            return self.convolve(x, layer, self.route_of(x, layer))
        key = x.shape, layer.stride, layer.padding, layer.dilation
        route = self._made.get(key)
        if route is None:
            if len(self._made) > _MOST_ROUTES:
                self.forget()
            route = self._made[key] = self.route_of(x, layer)
        return self.convolve(x, layer, route)

    def route_of(self, x: Tensor, layer: nn.Conv2d) -> Any:
        """Return the route of an input without gradients: a packed float weight, or a layout."""
        if self.memory == "lean" or not x.is_cpu or not x.numel():
            return torch.contiguous_format
        layout = dense_layout(x.shape, self.shape, layer.stride)
        is_float = x.dtype == self.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        if layout == "packed" and is_float and not isinstance(layer.padding, str):
            self.drop_kernels(x.shape)
            return prepare_dense_conv2d(self.decode(), x.shape, layer.stride, layer.padding, layer.dilation)
        return torch.channels_last if layout == "channels-last" else torch.contiguous_format

    def convolve(self, x: Tensor, layer: nn.Conv2d, route: Any) -> Tensor:
        """Convolve on a route of `route_of`."""
        geometry: Any = layer.stride, layer.padding, layer.dilation
        x = self.quantize_input(x)
        if isinstance(route, DenseKernel):
            return dense_conv2d(x, route, layer.bias, *geometry)
        y = nn.functional.conv2d(x, self.read(route), layer.bias, *geometry)
        return y.contiguous() if route is torch.channels_last and x.is_contiguous() else y

    def drop_kernels(self, sizes: torch.Size) -> None:
        """Let go of kernels for images of other sizes."""
        for key, kernel in list(self._made.items()):
            if getattr(kernel, "sizes", sizes) != sizes:
                del self._made[key]
