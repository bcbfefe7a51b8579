"""Train a weight through its quantized value: blocks move on their own behind it and may change their codeword."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_qnoise.schemes import PackedWeight, PQWeight, nearest
from lightning_qnoise.tied import codeword_sums


class LatentWeight:
    """A Parameter that shows its quantized value, with a latent weight behind it that the optimizer moves.

    The gradient at the quantized value is applied to the latent weight (straight-through, Bengio et al. 2013), and
    for a scheme with a codebook the mean over the blocks of a codeword to that codeword as well. After the step every
    block is assigned to its nearest codeword anew. The Parameter holds the latent weight only between `before_step` and
    `after_step`; forwards, validation and checkpoints see the quantized one.

    Args:
        parameter: The Parameter. `start` makes its value the latent one and quantizes it.
        packed: Its encoding.

    Attributes:
        latent: The latent weight, of the Parameter's shape and dtype.
        codebook: Parameter float32 `[n_centroids, block_size]` to be trained by the same optimizer; None where the
            scheme has none.

    Example:
        >>> from lightning_qnoise import PQ
        >>> weight = nn.Parameter(torch.randn(16, 8))
        >>> LatentWeight(weight, PQ(block_size=4, n_centroids=4).encode(weight)).start()
        >>> weight.view(-1, 4).unique(dim=0).shape
        torch.Size([4, 4])
    """

    def __init__(self, parameter: Tensor, packed: PackedWeight) -> None:
        self.parameter = parameter
        self.packed = packed
        self.latent = parameter.detach().clone()
        self.codebook: nn.Parameter | None = None
        if isinstance(packed, PQWeight):
            self.codebook = nn.Parameter(packed.codebook.float())
            self.codes = packed.indices().flatten().long()
            self._zero = ~packed.codebook.any(dim=1)[:, None]
            self._pruned = ~self._blocks(self.latent).any(dim=1)[:, None]
        self._is_stepping = False

    @torch.no_grad()
    def start(self) -> None:
        """Give the Parameter the quantized value."""
        if self.codebook is None:
            self.parameter.copy_(self.packed.project(self.latent))
            return
        self.codes = nearest(self._blocks(self.latent), self.codebook)
        self.parameter.copy_(nn.functional.embedding(self.codes, self.codebook).view_as(self.latent))

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the codebook its gradient, and the Parameter the latent value for the step."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        if self.codebook is not None:
            blocks = self._blocks(gradient)
            sums = codeword_sums(blocks, self.codes, len(self.codebook))
            counts = torch.bincount(self.codes, minlength=len(self.codebook)).clamp(min=1)[:, None]
            self.codebook.grad = (sums / counts).masked_fill_(self._zero, 0.0)
            gradient.copy_(blocks.masked_fill(self._pruned, 0.0).view_as(gradient))
        self.parameter.copy_(self.latent)
        self._is_stepping = True

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the latent value that the step has made, and show its quantized value."""
        if self._is_stepping:
            self.latent.copy_(self.parameter)
            self._is_stepping = False
            self.start()

    def pack(self) -> PackedWeight:
        """Return the encoding of the moment."""
        if self.codebook is None:
            return self.packed.scheme.encode(self.latent)
        assert isinstance(self.packed, PQWeight)
        self.packed.write(self.codes, self.codebook)
        return self.packed

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `load_state_dict` needs to go on bit-equally."""
        codebook = {} if self.codebook is None else {"codebook": self.codebook.detach()}
        return {"latent": self.latent, **codebook}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` returned."""
        self.latent.copy_(state["latent"])
        if self.codebook is not None:
            self.codebook.copy_(state["codebook"])
        self.start()

    def _blocks(self, values: Tensor) -> Tensor:
        return values.reshape(len(self.codes), -1)
