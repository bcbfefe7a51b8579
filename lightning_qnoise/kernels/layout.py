"""The layouts that the kernels read, made by torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack `n = 32 / bits` codes of consecutive groups into one word, the first in the lowest bits.

    Args:
        codes: Integers `[groups, out]` in `[0, 2**bits)`, of any integer dtype.
        bits: 1, 2, 4, 8 or 16.

    Returns:
        int32 `[ceil(groups / n), out]`; missing groups have code 0.
    """
    if bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"codes of 1, 2, 4, 8 or 16 bits can be packed into words, got {bits}")
    n = 32 // bits
    codes = F.pad(codes.long(), (0, 0, 0, -len(codes) % n)).unflatten(0, (-1, n))
    words = (codes << torch.arange(0, 32, bits, device=codes.device)[:, None]).sum(dim=1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def pad_codebook(codebook: Tensor) -> Tensor:
    """Pad the rows with zeros to a power of two, so that a kernel reads a row by one or two wide loads.

    Args:
        codebook: `[K, d]`, or `[n_codebooks, K, d]` where each serves `groups / n_codebooks` consecutive groups.

    Returns:
        `[n_codebooks, K, next_power_of_2(d)]`, contiguous.
    """
    d = codebook.shape[-1]
    padded = F.pad(codebook, (0, (1 << (d - 1).bit_length()) - d))
    return padded.reshape(-1, *padded.shape[-2:]).contiguous()


def segments(codes: Tensor, n_segments: int) -> tuple[Tensor, Tensor]:
    """Return which blocks have which code, for `segment_sum`: a stable order, hence the same sums every time.

    Args:
        codes: Integers of any shape in `[0, n_segments)`; block i is element i of the flattened tensor.
        n_segments: K, or K times the number of codebooks.

    Returns:
        int32 `order [N]` and `offsets [n_segments + 1]`: segment k is `order[offsets[k]:offsets[k + 1]]`.
    """
    codes = codes.flatten().long()
    counts = torch.bincount(codes, minlength=n_segments)
    return codes.argsort(stable=True).int(), F.pad(counts.cumsum(0), (1, 0)).int()
