"""`Int8Products`: packed weights that multiply in integers, where what enters their layer is quantized, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_qnoise.ops import (
    int8_backend,
    int8_conv2d,
    int8_linear,
    is_zero,
    prepare_grid,
    prepare_int8,
    prepare_int8_conv2d,
)
from lightning_qnoise.schemes.fast_conv import FastConvolutions, Grid, Route
from lightning_qnoise.schemes.recording import is_recorded

# Where integers are faster, with VNNI (`benchmarks/int8_speed.py`).
_LEAST = 2**14  # elements of a Linear that would be decoded,
_LEAST_PRODUCTS_DENSE = 2**21  # multiplications of one whose floats are kept,
_LEAST_PRODUCTS = 2**19  # of a convolution, if oneDNN starts for its floats, too,
_LEAST_PRODUCTS_ALONE = 5 * 2**18  # and if it does not;
_PASS = 4  # times as many for each pass over its numbers that integers add;
_PRODUCTS_PER_NUMBER = 36  # those that the passes which integers always add cost, for every number read or written,
_MORE_PER_NUMBER = 12  # and each further pass


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
        activation = self.scheme.activation
        if activation is None or self._is_small(x):
            dense = None if is_recorded() else self._made.get(torch.contiguous_format)
            if dense is not None:  # what `read` has decoded; at once, as every step shows in the time of a small layer
                return nn.functional.linear(x if activation is None else self.quantize_input(x), dense, bias)
            return self.linear_in_floats(x, bias)
        if not self._can_run_in_integers(x):
            return self.linear_in_floats(x, bias)
        weight, grid = self._made.get("int8"), self._made.get("grid")
        if weight is None:
            weight = self._made["int8"] = prepare_int8(*self.integers())
        if grid is None:
            grid = prepare_grid(weight, *self.input_grid(x), activation.bits)
            if activation.mode == "static":
                self._made["grid"] = grid
        return int8_linear(x, weight, bias, grid)

    def linear_in_floats(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the same where it is not possible."""
        return super().linear(x, bias)

    def route_of(self, x: Tensor, layer: nn.Conv2d, grid: Grid | None) -> Route | None:
        """Return a route in integers, where these are possible and faster."""
        activation = self.scheme.activation
        is_possible = self._can_run_in_integers(x) and int8_backend(x.device.type) == "onednn"
        if grid is None or activation is None or isinstance(layer.padding, int) or not is_possible:
            return super().route_of(x, layer, grid)
        is_unsigned, border, bits = is_zero(grid[1]), _border(layer), activation.bits
        n_passes = int(any(border) and not is_unsigned)
        if not self._pays(x, layer, n_passes):  # before anything is unpacked
            return super().route_of(x, layer, grid)
        codes, scale, zero_point, weight_bits = self.integers()
        if zero_point is not None and not self._pays(x, layer, n_passes + 1):
            return super().route_of(x, layer, grid)
        geometry = x.shape, layer.stride, border, layer.dilation
        known = grid[0] if activation.mode == "static" else None
        kernel = prepare_int8_conv2d(codes, scale, zero_point, weight_bits, *geometry, is_unsigned, known)
        self.drop_kernels(x.shape)

        def run(x: Tensor, bias: Tensor | None, grid: Grid | None) -> Tensor:
            assert grid is not None
            return int8_conv2d(x, kernel, bias, *grid, bits)

        return Route(run, kernel)

    def _is_small(self, x: Tensor) -> bool:
        if self.memory == "fast":
            return x.numel() * self.shape[0] < _LEAST_PRODUCTS_DENSE
        return self.shape.numel() < _LEAST

    def _pays(self, x: Tensor, layer: nn.Conv2d, n_passes: int) -> bool:
        """Whether the products that integers speed up outweigh the passes that they add."""
        stride = layer.stride[0] * layer.stride[1]
        products = x.numel() // (self.shape[1] * stride) * self.shape.numel()
        numbers = self.shape[1] * stride + self.shape[0]
        cost = (_PRODUCTS_PER_NUMBER + _MORE_PER_NUMBER * n_passes) * numbers / self.shape.numel()
        is_alone = self.layout_of(x, layer) not in ("packed", "contiguous")
        least = max(_LEAST_PRODUCTS * _PASS**n_passes, _LEAST_PRODUCTS_ALONE * is_alone)
        return products * (1 - cost) >= least

    def _can_run_in_integers(self, x: Tensor) -> bool:
        if self.observer is not None or is_recorded() or not x.numel():
            return False
        return "int8" in self._made or (self.is_int8 and int8_backend(x.device.type) is not None)


def _border(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """The zeros around an image, left, right, above and below."""
    if not isinstance(layer.padding, str):
        down, across = layer.padding
        return across, across, down, down
    if layer.padding == "valid":
        return 0, 0, 0, 0
    down, across = ((k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    return across // 2, across - across // 2, down // 2, down - down // 2
