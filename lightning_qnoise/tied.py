"""Train a weight on its codebook: it stays an ordinary Parameter in which all blocks of a codeword are equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_qnoise.schemes import PQWeight
from lightning_qnoise.sharding import local, local_rows, over_ranks


def codeword_sums(blocks: Tensor, codes: Tensor, n_codewords: int) -> Tensor:
    """Return the sum of the blocks of every codeword, always added in the same order.

    Args:
        blocks: Float `[n, block_size]`.
        codes: int64 `[n]`.
        n_codewords: K.

    Returns:
        float32 `[n_codewords, block_size]`; zeros where a codeword has no block.

    Example:
        >>> codeword_sums(torch.ones(3, 2), torch.tensor([0, 0, 1]), 2)
        tensor([[2., 2.],
                [1., 1.]])
    """
    add = _sums_in_place if codes.device.type == "cpu" else _sums_sorted
    return add(blocks.float(), codes, n_codewords)


def _sums_in_place(blocks: Tensor, codes: Tensor, n_codewords: int) -> Tensor:
    return blocks.new_zeros(n_codewords, blocks.shape[1]).index_add_(0, codes, blocks)


def _sums_sorted(blocks: Tensor, codes: Tensor, n_codewords: int) -> Tensor:
    """The same for a GPU, where `index_add_` adds in any order: ranks would differ."""
    counts = torch.bincount(codes, minlength=n_codewords)
    starts = counts.cumsum(0) - counts
    return nn.functional.embedding_bag(codes.argsort(stable=True), blocks, starts, mode="sum")


class TiedWeight:
    """A Parameter whose blocks are copies of codewords, and stay copies while an optimizer moves it.

    Before every optimizer step each block gets the mean gradient over the blocks of its codeword. An elementwise
    optimizer (SGD, Adam, ...) then moves them alike, which is the codebook update `c <- c - eta * mean dL/db` of Stock
    et al. (2020) without another Parameter. Blocks that drift apart, under other optimizers or by the rounding of an
    optimizer's kernel, are projected on their mean. A codeword of zeros (padding rows, pruned blocks) stays zero.

    Args:
        parameter: The Parameter. `start` puts it on the codebook.
        packed: Its encoding; its codes stay, its codebook is written by `pack`.

    Attributes:
        codes: int64 `[n_blocks]`, the codeword of every block; of a sharded weight (FSDP2), of this rank's blocks.
        codebook: None: there is no other Parameter to train.

    Example:
        >>> from lightning_qnoise import PQ
        >>> weight = nn.Parameter(torch.randn(16, 8))
        >>> TiedWeight(weight, PQ(block_size=4, n_centroids=4).encode(weight)).start()
        >>> weight.view(-1, 4).unique(dim=0).shape
        torch.Size([4, 4])
    """

    def __init__(self, parameter: Tensor, packed: PQWeight) -> None:
        self.parameter = parameter
        self.packed = packed
        self.codebook = None
        self._read()

    def _read(self) -> None:
        codebook, codes = self.packed.codewords(), self.packed.indices().long()
        self.codes = local_rows(codes, self.parameter).flatten()
        self._zero = ~codebook.any(dim=1, keepdim=True)
        self._counts = torch.bincount(codes.flatten(), minlength=len(codebook)).clamp(min=1)[:, None]

    @torch.no_grad()
    def start(self) -> None:
        """Give the Parameter its decoded value."""
        local(self.parameter).copy_(self._spread(self.packed.codewords()))

    @torch.no_grad()
    def before_step(self) -> None:
        """Give every block of the gradient the mean over the blocks of its codeword, in place."""
        gradient = self.parameter.grad
        if gradient is not None:
            local(gradient).copy_(self._spread(self._means(local(gradient))))

    @torch.no_grad()
    def after_step(self) -> None:
        """Project where the optimizer has moved blocks of one codeword apart, or zeros away."""
        shown = local(self.parameter)
        has_drifted = (shown != self._spread(self.codewords())).any()
        if over_ranks(has_drifted.float(), self.parameter, "max"):
            shown.copy_(self._spread(self._means(shown)))

    @torch.no_grad()
    def codewords(self) -> Tensor:
        """Return the codewords of the moment, `[n_centroids, block_size]` in the Parameter's dtype (unused: zero)."""
        blocks = self._blocks(local(self.parameter))
        found = blocks.new_full((len(self._counts), blocks.shape[1]), -torch.inf)
        found[self.codes] = blocks
        found = over_ranks(found, self.parameter, "max")
        return found.masked_fill_(found == -torch.inf, 0.0)

    def pack(self) -> PQWeight:
        """Return the encoding, with the codewords of the moment."""
        self.packed.write_codebook(self.codewords())
        return self.packed

    def state_dict(self) -> dict[str, Tensor]:
        """Return what, with the Parameter's value, `load_state_dict` needs to go on bit-equally."""
        return self.packed.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` returned; the Parameter is restored by others."""
        self.packed.load_state_dict(state)
        self._read()

    def _blocks(self, values: Tensor) -> Tensor:
        return values.reshape(-1, self.packed.scheme.block_size)

    def _means(self, values: Tensor) -> Tensor:
        sums = codeword_sums(self._blocks(values), self.codes, len(self._counts))
        return over_ranks(sums, self.parameter) / self._counts

    def _spread(self, codewords: Tensor) -> Tensor:
        like = local(self.parameter)
        return nn.functional.embedding(self.codes, codewords.masked_fill(self._zero, 0.0)).view_as(like).to(like.dtype)
