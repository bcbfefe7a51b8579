"""Train a weight through its quantized value: blocks move on their own behind it and may change their codeword."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_qnoise.schemes import PackedWeight, PQWeight, nearest
from lightning_qnoise.sharding import gather_rows, local, local_rows, over_ranks
from lightning_qnoise.tied import codeword_sums


class LatentWeight:
    """A Parameter that shows its quantized value, with a latent weight behind it that the optimizer moves.

    The gradient at the quantized value is applied to the latent weight (straight-through, Bengio et al. 2013), and
    for a scheme with a codebook the mean over the blocks of a codeword to that codeword as well. After the step every
    block is assigned to its nearest codeword anew. The Parameter holds the latent weight only between `before_step` and
    `after_step`; forwards, validation and checkpoints see the quantized one. A codeword of zeros and a block of
    zeros (padding rows, pruned blocks) stay zero.

    Args:
        parameter: The Parameter. `start` makes its value the latent one and quantizes it.
        packed: Its encoding.

    Attributes:
        latent: The latent weight, of the Parameter's shape and dtype; of a sharded one (FSDP2), this rank's rows.
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
        self.latent = local(parameter).detach().clone()
        self.codebook: nn.Parameter | None = None
        if isinstance(packed, PQWeight):
            self.codebook = nn.Parameter(packed.codewords().clone())
            self.codes = local_rows(packed.indices().long(), parameter).flatten()
            self._find_zeros(self.codebook)
        self._is_stepping = False

    @torch.no_grad()
    def start(self) -> None:
        """Give the Parameter the quantized value."""
        if self.codebook is None:
            shown = self.packed.project(gather_rows(self.latent, self.parameter))
            local(self.parameter).copy_(local_rows(shown, self.parameter))
            return
        self.latent.masked_fill_(self._pruned, 0.0)  # not every optimizer leaves what has no gradient
        self.codebook.masked_fill_(self._zero, 0.0)
        self.codes = nearest(self._blocks(self.latent), self.codebook)
        local(self.parameter).copy_(nn.functional.embedding(self.codes, self.codebook).view_as(self.latent))

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the codebook its gradient, and the Parameter the latent value for the step."""
        if self.parameter.grad is None:
            return
        if self.codebook is not None:
            gradient, k = local(self.parameter.grad), len(self.codebook)
            sums = codeword_sums(self._blocks(gradient), self.codes, k)
            counts = torch.bincount(self.codes, minlength=k)[:, None]
            sums = over_ranks(torch.cat([sums, counts], dim=1), self.parameter)
            self.codebook.grad = (sums[:, :-1] / sums[:, -1:].clamp(min=1)).masked_fill_(self._zero, 0.0)
            gradient.masked_fill_(self._pruned, 0.0)
        local(self.parameter).copy_(self.latent)
        self._is_stepping = True

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the latent value that the step has made, and show its quantized value."""
        if self._is_stepping:
            self.latent.copy_(local(self.parameter))
            self._is_stepping = False
            self.start()

    def pack(self) -> PackedWeight:
        """Return the encoding of the moment."""
        if not isinstance(self.packed, PQWeight):
            return self.packed.take(gather_rows(self.latent, self.parameter))
        assert self.codebook is not None
        self.packed.write_codes(gather_rows(self.codes.view(len(self.latent), -1), self.parameter))
        self.packed.write_codebook(self.codebook)
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
            self._find_zeros(self.codebook)
        self.start()

    def _find_zeros(self, codebook: Tensor) -> None:
        blocks = self._blocks(self.latent)
        self._zero = ~codebook.any(dim=1, keepdim=True)
        self._pruned = (~blocks.any(dim=1, keepdim=True)).expand_as(blocks).reshape(self.latent.shape)

    def _blocks(self, values: Tensor) -> Tensor:
        return values.reshape(-1, self.packed.scheme.noise_blocks(self.packed.shape)[1])
