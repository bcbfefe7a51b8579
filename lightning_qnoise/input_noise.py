"""Quantization noise on what enters a layer: some elements are quantized, the gradient passes straight through."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_qnoise.layers import on_rows
from lightning_qnoise.noise import draw_mask
from lightning_qnoise.schemes import Int, Scheme, dynamic_grid
from lightning_qnoise.schemes.ranges import affine_decode, affine_grid, find_range, round_trip

_N_BITS = 1 << 18  # random bits drawn for a batch, of which every layer reads a part
_SAMPLE = 4096  # values from which the range of one batch is found
_MOMENTUM = 0.1  # of the newest batch in the running range


class InputNoise:
    """The noise of what enters the layer of one weight, shared by all layers that own the weight.

    An element is quantized where its mask is set. A dynamic activation takes the range of the moment; a static one the
    running mean of the ranges of the batches before, to which the input is clamped first, so that what lies outside
    gets no gradient.

    Args:
        activation: The scheme.
        weight_shape: Shape of the layer's weight.
        name: Name of the weight; chooses which part of the random bits is read.
        in_eval: Whether the input is quantized in eval mode, too.

    Attributes:
        mask: bool `[n]`, from which the masks are cut; None quantizes every element, and is what a new one does.
        active: Whether there is noise.
        ends: Low and high of the running range of a static activation, float32 `[2]`; None before the first batch.

    Example:
        >>> noise = InputNoise(Int(2), (4, 3), "weight")
        >>> noise.apply(torch.tensor([[0.0, 0.9, 3.0]]))
        tensor([[0., 1., 3.]])
    """

    def __init__(self, activation: Int, weight_shape: Sequence[int], name: str, in_eval: bool = False) -> None:
        self.activation = activation
        self.in_eval = in_eval
        self.active = True
        self.mask: Tensor | None = None
        self.ends: Tensor | None = None
        self._shape = tuple(weight_shape)
        self._place = zlib.crc32(name.encode())
        self._seen: Tensor | None = None

    def draw(self, rate: float, mask: Tensor | None) -> None:
        """Take the mask of the next forwards."""
        self.active = rate > 0
        self.mask = mask if rate < 1 else None

    @torch.no_grad()
    def follow(self) -> None:
        """Let the running range follow the last batch. Called between two batches."""
        if self._seen is not None:
            self.ends = self._seen if self.ends is None else self.ends.lerp(self._seen, _MOMENTUM)
            self._seen = None

    def is_on(self, in_training: bool) -> bool:
        """Whether a forward is noisy."""
        return self.active and (in_training or self.in_eval)

    def apply(self, x: Tensor, in_training: bool = True) -> Tensor:
        """Return the input as the layer reads it, in its own shape and dtype; only in training ranges follow it."""
        if x.is_nested:  # which TransformerEncoder makes of padded sequences
            return on_rows(lambda rows: self.apply(rows, in_training), x)
        if not x.numel():
            return x
        scale, zero_point, is_whole = self._grid(x.detach(), in_training)
        bits = self.activation.bits
        if not is_whole:
            low, high = (affine_decode(code, scale, zero_point).to(x.dtype) for code in (0, 2**bits - 1))
            x = torch.clamp(x, low, high)
        value = x.detach()
        noisy = round_trip(value, scale, zero_point, bits)
        if self.mask is not None:
            noisy = torch.where(self._cut(self.mask, x), noisy, value)
        return x - value + noisy  # the difference is exactly zero; it carries the gradient

    def _grid(self, value: Tensor, in_training: bool) -> tuple[Tensor, Tensor | int, bool]:
        """Scale, zero point, and whether they cover the whole input."""
        activation = self.activation
        if activation.mode == "dynamic":
            return *dynamic_grid(value, activation, self._shape), activation.range == "minmax"
        sample = value.flatten()
        if activation.range not in ("minmax", "ema"):
            if sample.numel() > _SAMPLE:  # a stride would meet few features where it shares a factor with their number
                places = torch.arange(_SAMPLE, device=sample.device) * 2654435761 % sample.numel()
                sample = sample[places]
        seen = torch.stack(find_range(sample.float(), activation.bits, activation.symmetric, activation.range))
        if in_training:
            before = seen if self._seen is None else self._seen  # of another input of the layer, in the same batch
            self._seen = torch.stack([torch.minimum(seen[0], before[0]), torch.maximum(seen[1], before[1])])
        low, high = seen if self.ends is None else self.ends
        return *affine_grid(low, high, activation.bits, activation.symmetric), False

    def _cut(self, mask: Tensor, x: Tensor) -> Tensor:
        """The part of the mask that belongs to this layer, repeated where the input is larger than the mask."""
        n = x.numel()
        if n > len(mask):
            return mask.repeat(-(-n // len(mask)))[:n].view(x.shape)
        start = self._place % (len(mask) - n + 1)
        return mask[start : start + n].view(x.shape)


class InputNoises:
    """The noise of the inputs of several layers, weight name -> `InputNoise`, whose masks are cut from one draw.

    Args:
        schemes: Weight name -> scheme; those with an activation get noise.
        shapes: Weight name -> shape.
    """

    def __init__(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, Sequence[int]]) -> None:
        self.of: dict[str, InputNoise] = {
            name: InputNoise(scheme.activation, shapes[name], name)
            for name, scheme in schemes.items()
            if scheme.activation is not None
        }

    def draw(self, rate: float, generator: torch.Generator) -> None:
        """Draw the masks of the next forwards: each element with probability `rate`."""
        if not self.of:
            return
        mask = torch.empty(_N_BITS, dtype=torch.bool, device=generator.device)
        draw_mask(mask, rate, generator)
        for noise in self.of.values():
            noise.follow()
            noise.draw(rate, mask)

    def follow(self) -> None:
        """Let the running ranges follow the last batch."""
        for noise in self.of.values():
            noise.follow()

    def stop(self) -> None:
        """Leave the inputs alone until the next draw."""
        for noise in self.of.values():
            noise.active = False

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running ranges."""
        self.follow()
        return {name: noise.ends for name, noise in self.of.items() if noise.ends is not None}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take what `state_dict` returned, as far as it is of the same weights."""
        for name, noise in self.of.items():
            if name in state:
                noise.ends = state[name].to(device)
