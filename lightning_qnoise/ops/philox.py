"""Masks from a counter: which blocks of a weight are noised follows from a seed and a place, and nothing is stored.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in torch's integers, which a kernel
repeats bit by bit on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 2**32 - 1
_FACTORS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85  # of the two halves of the key, from round to round


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the four random words of every counter, Philox4x32 with ten rounds.

    Args:
        counter: Four int64 tensors in `[0, 2**32)` that broadcast together, the lowest word first.
        key: Two, the lower word first.

    Returns:
        Four int64 tensors in `[0, 2**32)`.

    Example:
        >>> zero = torch.tensor(0)
        >>> [f"{word.item():08x}" for word in philox([zero] * 4, [zero] * 2)]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]  # modulo 2**64: the bits are those of the unsigned product
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = k0 + _STEPS[0] & _WORD, k1 + _STEPS[1] & _WORD
    return c0, c1, c2, c3


def philox_mask(seed: Tensor, rate: Tensor, rows: int, blocks: int) -> Tensor:
    """Return which blocks of a weight are noised.

    Block `b` of row `r` reads word `b % 4` of the counter `(b // 4, r, 0, 0)` under the key `seed`, lower half first.
    It is noised where the upper 24 bits of the word are below `rate * 2**24`, rounded down.

    Args:
        seed: int64 `[1]`, any value.
        rate: float32 `[]` on the same device, the probability of a block to within 2^-24: all from 1 on, none up to 0.
        rows: Rows of the weight, below 2^32.
        blocks: Blocks in a row, below 2^34.

    Returns:
        bool `[rows, blocks]`.

    Example:
        >>> philox_mask(torch.tensor([1]), torch.tensor(0.5), rows=2, blocks=5)
        tensor([[False, False, False, False, False],
                [False,  True,  True,  True, False]])
    """
    row, quad = (torch.arange(n, device=seed.device) for n in (rows, -(-blocks // 4)))
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = torch.stack(philox([quad, row[:, None], zero, zero], [seed & _WORD, seed >> 32 & _WORD]), dim=-1)
    threshold = (rate.clamp(0, 1) * 2**24).long()
    return (words.view(rows, 4 * len(quad))[:, :blocks] >> 8) < threshold
