"""Train the scale of integers together with the weight behind them (LSQ)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_qnoise.latent import LatentWeight
from lightning_qnoise.schemes import IntWeight
from lightning_qnoise.schemes.ranges import affine_round


class LearnedScale(LatentWeight):
    """A `LatentWeight` of integers whose scales are trained as well (Esser et al. 2020, "Learned Step Size").

    The gradient of a scale is that of its section 2.1, times `1 / sqrt(n * qmax)` for the `n` elements that share it;
    what the integers do not cover gets none. What the optimizer moves is the logarithm of the scale over the one at the
    start, so that an adaptive step is relative, the scale stays positive, and weight decay pulls it to its start.

    Args:
        parameter: The Parameter, not sharded.
        packed: Its encoding.

    Attributes:
        codebook: Parameter float32 `[rows, groups]`, that logarithm.

    Example:
        >>> from lightning_qnoise import Int
        >>> weight = nn.Parameter(torch.randn(16, 8))
        >>> held = LearnedScale(weight, Int(4, range="lsq").encode(weight))
        >>> held.start()
        >>> held.codebook.shape
        torch.Size([16, 1])
    """

    packed: IntWeight
    codebook: nn.Parameter

    def __init__(self, parameter: Tensor, packed: IntWeight) -> None:
        super().__init__(parameter, packed)
        self._first = packed.scale.clone()
        self.codebook = nn.Parameter(torch.zeros_like(packed.scale))

    @torch.no_grad()
    def start(self) -> None:
        """Give the Parameter the quantized value."""
        self.packed.scale.copy_(self._first * self.codebook.exp())
        self.parameter.copy_(self.packed.project(self.latent))

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the scales their gradient, and the Parameter the latent value for the step."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        levels, scale, zeros = (
            2**self.packed.scheme.bits - 1,
            self.packed.scale[..., None],
            self.packed.zeros[..., None],
        )
        latent, arriving = (part.reshape(*scale.shape[:2], -1).float() for part in (self.latent, gradient))
        place = latent / scale + zeros
        is_covered = (place >= 0) & (place <= levels)
        slope = affine_round(latent, scale, zeros, self.packed.scheme.bits) - zeros
        slope = slope - torch.where(is_covered, latent / scale, 0.0)
        shared = (latent.shape[-1] * max(1, levels // 2)) ** -0.5
        self.codebook.grad = (arriving * slope).sum(dim=-1) * self.packed.scale * shared
        gradient.masked_fill_(~is_covered.view(gradient.shape), 0.0)
        self.parameter.copy_(self.latent)
        self._is_stepping = True

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `load_state_dict` needs to go on bit-equally."""
        zeros = {} if self.packed.zero_point is None else {"zero_point": self.packed.zero_point}
        return {"latent": self.latent, "codebook": self.codebook.detach(), "scale": self._first, **zeros}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` returned."""
        self.latent.copy_(state["latent"])
        self.codebook.copy_(state["codebook"])
        self._first.copy_(state["scale"])
        if self.packed.zero_point is not None:
            self.packed.zero_point.copy_(state["zero_point"])
        self.start()
