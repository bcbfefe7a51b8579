"""`Int8Products`: packed weights that multiply in integers, where what enters their layer is quantized, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_qnoise.ops import Int8Grid, Int8Weight, has_int8, int8_conv2d, int8_linear, prepare_grid
from lightning_qnoise.schemes.packed import PackedWeight

# Where integers are faster, with VNNI (`benchmarks/int8_speed.py`).
_LEAST = 2**14  # elements of a Linear
_LEAST_PRODUCTS = 2**21  # of a convolution: multiplications in all,
_LEAST_REUSE = 128  # and multiplications for each number that is read or written


class Int8Products(PackedWeight):
    """A packed weight whose Linear or Conv2d runs in integers.

    They do so without gradients, on devices with exact integer kernels (a convolution on CPUs), and where they are
    large enough to be faster. That keeps a byte an element in memory.
    """

    @property
    def is_int8(self) -> bool:
        """Whether the weight has a form for integer products."""
        return False

    def int8_matrix(self) -> Int8Weight:
        """Return that form; called once, until `forget`."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `quantize_input(x) @ decode().T + bias`, `[..., out]`, in integers where that is possible."""
        if self._runs_in_integers(x) and self.shape.numel() >= _LEAST:
            return int8_linear(x, self._int8(), bias, self._int8_grid(x))
        return self.linear_in_floats(x, bias)

    def linear_in_floats(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the same where it is not possible."""
        return super().linear(x, bias)

    def conv2d(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """Convolve, in integers where that is possible and faster."""
        if not (x.is_cpu and self._runs_in_integers(x) and self._pays(x, layer)):
            return super().conv2d(x, layer)
        geometry = layer.kernel_size, layer.stride, layer._reversed_padding_repeated_twice, layer.dilation
        return int8_conv2d(x, self._int8(), layer.bias, self._int8_grid(x), *geometry)

    def _int8(self) -> Int8Weight:
        if "int8" not in self._made:
            self._made["int8"] = self.int8_matrix()
        return self._made["int8"]

    def _int8_grid(self, x: Tensor) -> Int8Grid:
        """The grid of an input; a static one is made once."""
        activation = self.scheme.activation
        assert activation is not None
        if "grid" in self._made:
            return self._made["grid"]
        grid = prepare_grid(self._int8(), *self.input_grid(x), activation.bits)
        if activation.mode == "static":
            self._made["grid"] = grid
        return grid

    def _pays(self, x: Tensor, layer: nn.Conv2d) -> bool:
        stride = layer.stride[0] * layer.stride[1]
        products = x.numel() // (self.shape[1] * stride) * self.shape.numel()
        passes = self.shape[1] * stride + self.shape[0]
        return products >= _LEAST_PRODUCTS and self.shape.numel() >= _LEAST_REUSE * passes

    def _runs_in_integers(self, x: Tensor) -> bool:
        if self.scheme.activation is None or self.observer is not None or not x.numel():
            return False
        is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return is_plain and self.is_int8 and has_int8(x.device.type)
