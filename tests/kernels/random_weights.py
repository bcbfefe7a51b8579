"""Random product-quantized weights for the tests of the kernels; tests of `*_cases.py` run in the interpreter."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Weight:
    codes: Tensor  # [out, groups]
    codebook: Tensor  # [K, d]
    dense: Tensor  # as it decodes, in the dtype of the codebook

    @property
    def args(self):
        return self.codes, self.codebook

    @property
    def n_in(self):
        return self.dense.shape[1]


LAYOUTS = {  # columns before and after the codes in memory, bytes before them, columns from one to the next
    "rows": (0, 0, 0, 1),
    "in whole words": (16, 16, 0, 1),
    "in odd rows": (0, 1, 0, 1),
    "at an odd address": (0, 0, 1, 1),
    "in every other column": (0, 0, 0, 2),
    "columns": (0, 0, 0, 1),
}


def lay_out(codes, layout):
    """Return the same codes with other strides."""
    if layout == "columns":
        return codes.t().contiguous().t()
    (n_out, groups), (before, after, offset, step) = codes.shape, LAYOUTS[layout]
    row = before + groups * step + after
    memory = codes.new_zeros(n_out * row + offset)[offset:].view(n_out, row)
    return memory[:, before : before + groups * step : step].copy_(codes)


def random_weight(n_out=20, groups=5, k=12, d=8, dtype=torch.float32, code_dtype=torch.uint8, layout="rows"):
    codes = torch.randint(k, (n_out, groups))
    codebook = torch.randn(k, d).to(dtype)
    dense = codebook[codes].reshape(n_out, groups * d)
    return Weight(lay_out(codes.to(code_dtype), layout), codebook, dense)


def poison(monkeypatch):
    """Fill what `torch.Tensor.new_empty` allocates with NaN: an element that no program writes shows."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: fill(new_empty(*args, **kwargs)))


def fill(x):
    return x.fill_(torch.nan if x.is_floating_point() else -1)
