"""Random product-quantized weights for the tests of the kernels; tests of `*_cases.py` run in the interpreter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qnoise.kernels.layout import pack_words, pad_codebook


@dataclass
class Weight:
    words: Tensor
    codebook: Tensor
    n_in: int
    block_size: int
    bits: int
    dense: Tensor  # as it decodes, in the dtype of the codebook

    @property
    def args(self):
        return self.words, self.codebook, self.n_in, self.block_size, self.bits


def random_weight(n_out=20, n_in=40, k=12, d=8, bits=8, n_codebooks=1, dtype=torch.float32, word=torch.int32):
    groups = -(-n_in // d)
    codes = torch.randint(k, (groups, n_out))
    codebook = torch.randn(n_codebooks, k, d).to(dtype)
    which = torch.arange(groups)[:, None] // (groups // n_codebooks)
    dense = codebook[which, codes].permute(1, 0, 2).reshape(n_out, groups * d)[:, :n_in]
    words = pack_words(codes, bits) if word == torch.int32 else codes.to(word)
    return Weight(words, pad_codebook(codebook), n_in, d, bits, dense)


def poison(monkeypatch):
    """Fill what `torch.Tensor.new_empty` allocates with NaN: an element that no program writes shows."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: fill(new_empty(*args, **kwargs)))


def fill(x):
    return x.fill_(torch.nan if x.is_floating_point() else -1)
