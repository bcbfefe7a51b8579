"""What the kernels read beside the codes, made by torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_codebook(codebook: Tensor) -> Tensor:
    """Pad the rows of a codebook with zeros to a power of two, so that a kernel reads one by one or two wide loads.

    Args:
        codebook: `[K, d]`.

    Returns:
        `[K, next_power_of_2(d)]`, contiguous.
    """
    d = codebook.shape[1]
    return F.pad(codebook, (0, (1 << (d - 1).bit_length()) - d)).contiguous()


def segments(codes: Tensor, n_segments: int) -> tuple[Tensor, Tensor]:
    """Return which blocks have which code, for `segment_sum`: a stable order, hence the same sums every time.

    Nothing waits for a GPU.

    Args:
        codes: Integers of any shape in `[0, n_segments)`; block i is element i of the flattened tensor. A GPU sorts
            those of one byte in one pass.
        n_segments: K.

    Returns:
        int32 `order [N]` and `offsets [n_segments + 1]`: segment k is `order[offsets[k]:offsets[k + 1]]`.

    Raises:
        ValueError: An index of a block would not fit into 32 bits.
    """
    if codes.numel() >= 2**31:
        raise ValueError(f"at most {2**31 - 1} blocks can be sorted at once, got {codes.numel()}")
    if n_segments - 1 > torch.iinfo(codes.dtype).max:
        codes = codes.long()  # the boundaries have its dtype
    found, order = codes.flatten().sort(stable=True)
    ends = torch.searchsorted(
        found, torch.arange(n_segments, dtype=found.dtype, device=found.device), right=True, out_int32=True
    )
    return order.int(), F.pad(ends, (1, 0))
