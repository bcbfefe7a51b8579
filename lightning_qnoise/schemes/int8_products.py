"""`Int8Products`: packed weights that multiply in integers, where what enters their layer is quantized, too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_qnoise.ops import (
    Int8Kernel,
    int8_backend,
    int8_conv2d,
    int8_linear,
    prepare_grid,
    prepare_int8,
    prepare_int8_conv2d,
)
from lightning_qnoise.schemes.fast_conv import FastConvolutions
from lightning_qnoise.schemes.packed import is_recorded

# Where integers are faster, with VNNI (`benchmarks/int8_speed.py`).
_LEAST = 2**14  # elements of a Linear that would be decoded,
_LEAST_PRODUCTS_DENSE = 2**21  # multiplications of one whose floats are kept,
_LEAST_REUSE = {2**25: 64, 3 * 2**22: 150, 2**22: 500}  # of a convolution, and for each number that is read or written


class Int8Products(FastConvolutions):
    """A packed weight whose Linear or Conv2d runs in integers.

    They do so without gradients, on devices with exact integer kernels (a convolution on CPUs), and where they are
    large enough to be faster. That keeps a byte an element in memory.
    """

    @property
    def is_int8(self) -> bool:
        """Whether the weight has a form for integer products."""
        return False

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Return that form: codes of the weight's shape, scale, zero point and bits, see `prepare_int8`."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `quantize_input(x) @ decode().T + bias`, `[..., out]`, in integers where that is possible."""
        if self.scheme.activation is None or self._is_small(x):
            if (dense := self.kept()) is not None:  # at once, as it shows in the time of a small layer
                return nn.functional.linear(self.quantize_input(x), dense, bias)
            return self.linear_in_floats(x, bias)
        if not self._runs_in_integers(x):
            return self.linear_in_floats(x, bias)
        if "int8" not in self._made:
            self._made["int8"] = prepare_int8(*self.integers())
        weight, grid = self._made["int8"], self._made.get("grid")
        if grid is None:
            grid = prepare_grid(weight, *self._input(x))
            if self.scheme.activation is not None and self.scheme.activation.mode == "static":
                self._made["grid"] = grid
        return int8_linear(x, weight, bias, grid)

    def linear_in_floats(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the same where it is not possible."""
        return super().linear(x, bias)

    def route_of(self, x: Tensor, layer: nn.Conv2d) -> Any:
        """Return the kernels for integers, of one size of images at a time, where these are possible and faster."""
        if not (self._runs_in_integers(x) and self._pays(x, layer)):
            return super().route_of(x, layer)
        self.drop_kernels(x.shape)
        padding = layer._reversed_padding_repeated_twice
        return prepare_int8_conv2d(*self.integers(), x.shape, layer.stride, padding, layer.dilation)

    def convolve(self, x: Tensor, layer: nn.Conv2d, route: Any) -> Tensor:
        """Convolve, in integers where that is possible and faster."""
        if not isinstance(route, Int8Kernel):
            return super().convolve(x, layer, route)
        return int8_conv2d(x, route, layer.bias, *self._input(x))

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor | int, int]:
        activation = self.scheme.activation
        assert activation is not None
        return *self.input_grid(x), activation.bits

    def _is_small(self, x: Tensor) -> bool:
        if self.memory == "fast":
            return x.numel() * self.shape[0] < _LEAST_PRODUCTS_DENSE
        return self.shape.numel() < _LEAST

    def _pays(self, x: Tensor, layer: nn.Conv2d) -> bool:
        stride = layer.stride[0] * layer.stride[1]
        products = x.numel() // (self.shape[1] * stride) * self.shape.numel()
        passes = self.shape[1] * stride + self.shape[0]
        reuse = self.shape.numel() / passes
        is_large = any(products >= least and reuse >= least_reuse for least, least_reuse in _LEAST_REUSE.items())
        return is_large and int8_backend(x.device.type) == "onednn"

    def _runs_in_integers(self, x: Tensor) -> bool:
        if self.scheme.activation is None or self.observer is not None or not x.numel() or is_recorded():
            return False
        return self.is_int8 and int8_backend(x.device.type) is not None
