"""Quant-Noise of one weight: a random subset of its blocks reads as its quantized value. How it enters: attach.py."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_qnoise.ops import fake_quant_noise
from lightning_qnoise.ops.library import has_triton
from lightning_qnoise.schemes import PackedWeight, Scheme, matrix_shape

Kind = Literal["exact", "zero", "mean"]


def check_kind(kind: str) -> None:
    """Raise a ValueError unless `kind` is one of the kinds of noise."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")


def quant_noise(weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Replace the masked blocks of a weight by a target, with a straight-through gradient (Fan et al., eq. 5 and 6).

    Args:
        weight: Float weight.
        target: What the blocks become; broadcasts against the blocks `[rows, blocks, unit]`.
        mask: bool `[rows, blocks]`, true where a block is replaced.

    Returns:
        The noisy weight, of the shape and dtype of `weight`. Its gradient with respect to `weight` is the identity
        on every element.

    Example:
        >>> weight = torch.ones(1, 4, requires_grad=True)
        >>> quant_noise(weight, torch.zeros(()), torch.tensor([[True, False]]))
        tensor([[0., 0., 1., 1.]], grad_fn=<AddBackward0>)
    """
    value = weight.detach()
    blocks = value.reshape(*mask.shape, -1)
    noisy = torch.where(mask[..., None], target, blocks).view(weight.shape)
    return weight - value + noisy  # the difference is exactly zero; it carries the gradient


def draw_mask(mask: Tensor, rate: float, generator: torch.Generator) -> None:
    """Fill a contiguous bool mask, each entry true with probability `rate` to within 2^-17, in place.

    An entry takes 16 random bits, so that this is three times as fast as `bernoulli_` on a CPU.
    """
    if rate >= 1:
        mask.fill_(True)
        return
    words = torch.empty((mask.numel() + 3) // 4, dtype=torch.int64, device=mask.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: mask.numel()]
    torch.lt(bits, min(round(rate * 2**16), 2**16 - 1) - 2**15, out=mask.view(-1))


def runs_in_one_pass(device: torch.device) -> bool:
    """Whether `fake_quant_noise` noises the weights on a device: it chooses the blocks as it goes, and stores no mask.

    Where it has a kernel. On a CPU torch's generator draws a mask faster than Philox in torch's integers.

    Example:
        >>> runs_in_one_pass(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and has_triton()


class WeightNoise:
    """The noise of one Parameter, shared by all of its owners.

    Args:
        weight: The Parameter.
        scheme: What it will become.
        kind: `"exact"` replaces a block by its quantized value, `"zero"` by zeros (the paper's phi_proxy), `"mean"`
            by the mean block of the weight. Schemes that distort single elements (`Int`) are always exact.

    Attributes:
        is_fitted: Whether the noise reads an encoding that outlives the batch, a codebook or a fitted range, whereas
            `Int` with a min-max range quantizes the weight of the moment.
        target: That encoding; made at the first draw, and given anew to refresh it.
        mask: bool `[rows, blocks]`, true where a block is replaced; where weights are not noised in one pass.
        seed: int64 `[1]`, from which the blocks are chosen in one pass.
        rate: float32 `[]`, the probability of a block in one pass.
        window: How many forwards that may read the noise are running.
        read: What they have read, by whether gradients are on: one noisy weight serves all readers of a forward.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, kind: Kind = "exact") -> None:
        check_kind(kind)
        self.scheme = scheme
        rows, cols = matrix_shape(weight.shape)
        self.unit = scheme.noise_blocks(weight.shape)[1]
        self.kind: Kind = kind if self.unit > 1 else "exact"
        self.blocks = rows, cols // self.unit
        self.in_one_pass = runs_in_one_pass(weight.device)
        if self.in_one_pass:  # written in place, so that a captured graph reads them anew
            self.seed = torch.zeros(1, dtype=torch.int64, device=weight.device)
            self.rate = torch.zeros((), dtype=torch.float32, device=weight.device)
        else:
            self.mask = torch.zeros(self.blocks, dtype=torch.bool, device=weight.device)
        empty = scheme.empty(weight.shape, weight.dtype, "meta")
        self.is_fitted = self.kind == "exact" and empty.is_fixed
        self.target: PackedWeight | None = None if self.is_fitted else empty
        self.active = False
        self.window = 0
        self.read: dict[bool, Tensor] = {}

    def encode(self, weight: Tensor) -> PackedWeight:
        """Return the encoding of the weight of the moment, clustered from the previous one where there is one."""
        return self.scheme.encode(weight.detach(), self.target)

    def draw(self, weight: Tensor, rate: float, generator: torch.Generator) -> None:
        """Draw the blocks of the next forwards: each with probability `rate`."""
        self.active = rate > 0
        if not self.active:
            return
        if self.in_one_pass:
            self.seed.random_(-(2**63), None, generator=generator)
            self.rate.fill_(rate)
        else:
            draw_mask(self.mask, rate, generator)
        if self.is_fitted:
            self.target = self.target or self.encode(weight)
            if type(self.target).follow is not PackedWeight.follow:  # the others need no mask
                self.target.follow(weight, self.drawn())

    def drawn(self) -> Tensor:
        """Return the blocks that are replaced until the next draw, bool `[rows, blocks]`."""
        if not self.in_one_pass:
            return self.mask
        zeros = torch.zeros(self.blocks, dtype=torch.float16, device=self.seed.device)
        return fake_quant_noise(zeros, self.seed, self.rate, table=zeros.new_ones(1, 1)) > 0

    def apply(self, weight: Tensor) -> Tensor:
        """Return the weight as a forward reads it."""
        arguments = self._arguments(weight) if self.in_one_pass else {}
        if self.kind == "exact" and self.target is not None and "clamp" not in arguments:
            weight = self.target.clamp(weight)
        if self.in_one_pass:
            return fake_quant_noise(weight, self.seed, self.rate, self.unit, **arguments)
        return quant_noise(weight, self._target(weight), self.mask)

    @torch.no_grad()
    def _arguments(self, weight: Tensor) -> dict[str, Any]:
        if self.kind == "exact":
            assert self.target is not None
            return self.target.noise_arguments(weight)
        return {} if self.kind == "zero" else {"table": self._target(weight)[None]}

    @torch.no_grad()
    def _target(self, weight: Tensor) -> Tensor:
        if self.kind == "exact":
            assert self.target is not None
            return self.target.project(weight).reshape(*self.blocks, -1)
        if self.kind == "zero":
            return weight.new_zeros(())
        return weight.detach().reshape(-1, self.unit).mean(dim=0)
