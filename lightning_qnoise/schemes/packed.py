"""`PackedWeight`: one compressed weight, the result of `Scheme.encode`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_qnoise.schemes.activation import dynamic_grid
from lightning_qnoise.schemes.observer import Observer
from lightning_qnoise.schemes.ranges import affine_decode, affine_grid, round_trip
from lightning_qnoise.schemes.recording import is_recorded

if TYPE_CHECKING:
    from lightning_qnoise.schemes.base import Scheme


def _never_called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A packed weight has no forward."""


class PackedWeight(nn.Module):
    """One compressed weight. Its buffers are the file format, and `nbytes` of them the reported size.

    A subclass registers its buffers in the constructor and implements `decode`. Moving it to another dtype changes
    `dtype`, that of the decoded weight, and leaves the stored buffers as they are.

    Args:
        scheme: The scheme that makes it.
        shape: Shape of the decoded weight.
        dtype: Dtype of the decoded weight.
        device: Where its buffers lie.

    Attributes:
        input_scale: Of a static activation, float32 `[]`, NaN until it is calibrated.
        input_zero_point: Of a static activation, uint8 `[]`.
        memory: `"fast"` keeps what was decoded for the next forward, `"lean"` does not; a trained one neither does.
        observer: Where there is one, it sees the inputs, and they pass unquantized (calibration).
        is_trained: Whether a part of it is a Parameter, which an optimizer may move between two forwards.
    """

    input_scale: Tensor
    input_zero_point: Tensor
    is_trained = False

    def __init__(
        self, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.memory: Literal["lean", "fast"] = "lean"
        self.observer: Observer | None = None
        self._made: dict[Any, Any] = {}  # from the buffers, for one forward after the other
        if scheme.activation is not None:
            # nn.TransformerEncoderLayer bypasses its Linear layers in eval mode, but where a module below has a hook
            self.register_forward_pre_hook(_never_called)
        if scheme.activation is not None and scheme.activation.mode == "static":
            self.register_buffer("input_scale", torch.full((), torch.nan, dtype=torch.float32, device=device))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.uint8, device=device))

    def decode(self) -> Tensor:
        """Return the weight, of `shape` and `dtype`."""
        raise NotImplementedError

    def stored_state(self) -> dict[str, Tensor]:
        """Return what a file holds of it: its state dict as it is where nothing is trained."""
        return self.state_dict(keep_vars=True)

    def read(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Return the decoded weight as a layer reads it: decoded once where memory and gradients allow."""
        if self.memory == "lean" or is_recorded():
            return self.decode()
        if memory_format in self._made:
            return self._made[memory_format]
        dense = self.decode().contiguous(memory_format=memory_format)
        if not self.is_trained:  # an optimizer may have moved it by the next forward
            self._made[memory_format] = dense
        return dense

    def forget(self) -> None:
        """Let go of everything that was made from the buffers."""
        self._made.clear()

    def follow(self, weight: Tensor, mask: Tensor) -> None:
        """Encode the masked blocks of a weight that has moved since, on the same grid. Called before `project`.

        Args:
            weight: Float weight of `shape`.
            mask: bool `[rows, cols // unit]`, see `Scheme.noise_blocks`.
        """

    def project(self, weight: Tensor) -> Tensor:
        """Return what quantization puts in the place of `weight` (the paper's phi), of the same shape and dtype."""
        return self.decode()

    def noise_arguments(self, weight: Tensor) -> dict[str, Any]:
        """Return what `fake_quant_noise` takes, but for seed, rate and unit, to put `project` in the place of blocks.

        By default the blocks of `project` are the table. `clamp` is called before unless it is among the arguments.
        """
        rows, unit = weight.shape[0], self.scheme.noise_blocks(weight.shape)[1]
        table = self.project(self.clamp(weight)).reshape(-1, unit)
        return {"codes": torch.arange(len(table), device=table.device).view(rows, -1), "table": table}

    @property
    def is_fixed(self) -> bool:
        """Whether `project` reads what was encoded, not the weight of the moment alone."""
        return True

    def clamp(self, weight: Tensor) -> Tensor:
        """Return the weight within the range that can be encoded, with its gradient; called before `project`."""
        return weight

    def take(self, weight: Tensor) -> PackedWeight:
        """Return the encoding of another value of the weight that decodes to its `project`."""
        raise NotImplementedError

    def input_grid(self, x: Tensor) -> tuple[Tensor, Tensor | int]:
        """Return scale and zero point of an input of the layer, float32 (or one number), which broadcast to it.

        Raises:
            RuntimeError: The activation is static and was never calibrated.
        """
        activation = self.scheme.activation
        assert activation is not None
        if activation.mode == "dynamic":
            return dynamic_grid(x, activation, self.shape)
        if torch.compiler.is_compiling():
            return self.input_scale, self.input_zero_point.float()
        if "range" not in self._made:
            if self.input_scale.isnan():  # looked at once: on a GPU it waits for the device
                raise RuntimeError("a static activation has no range yet: call calibrate(model, loader) first")
            self._made["range"] = self.input_scale, int(self.input_zero_point)
        return self._made["range"]

    def set_input_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the range of a static activation, float32 `[]` each, `low <= 0 <= high`."""
        activation = self.scheme.activation
        assert activation is not None
        self.forget()
        scale, zero_point = affine_grid(low, high, activation.bits, activation.symmetric)
        self.input_scale.copy_(scale)
        self.input_zero_point.copy_(zero_point)

    def input_state(self) -> dict[str, Tensor]:
        """Return the part of the state dict that calibration writes."""
        return {name: buffer for name, buffer in self.named_buffers() if name.startswith("input_")}

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return an input of the layer as the scheme quantizes it, in its own shape and dtype.

        The gradient passes straight through, but for what a static range cuts off.
        """
        activation = self.scheme.activation
        if activation is None or not x.numel():
            return x
        if self.observer is not None:
            self.observer.update(x)
            return x
        bits, grid = activation.bits, self.input_grid(x)
        quantized = round_trip(x, *grid, bits)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return quantized
        if activation.mode == "static":
            x = x.clamp(*(affine_decode(code, *grid).to(x.dtype) for code in (0, 2**bits - 1)))
        return x - x.detach() + quantized  # the difference is exactly zero; it carries the gradient

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `quantize_input(x) @ decode().T + bias`, `[..., out]`."""
        return nn.functional.linear(self.quantize_input(x), self.read(), bias)

    def conv2d(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """Return what `layer`, an ungrouped convolution with zero padding, makes of `quantize_input(x)`."""
        return layer._conv_forward(self.quantize_input(x), self.read(), layer.bias)

    def embedding(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """Return the rows `ids`, `[*ids.shape, dim]`; the row `padding_idx` passes no gradient on."""
        return nn.functional.embedding(ids, self.read(), padding_idx)

    def extra_repr(self) -> str:
        """Show scheme and shape in `print(model)`."""
        return f"{self.scheme}, shape={list(self.shape)}"

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        def keep_dtype(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        self.forget()
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keep_dtype, recurse)
