"""`Observer`: the range of what it has seen, batch after batch, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.schemes.ranges import find_range

_BINS = 2048  # of each sign
_MOMENTUM = 0.1  # of the newest batch in an average of ranges


class Observer:
    """Collects inputs and returns the range that integers are to cover.

    Other methods than `"minmax"` and `"ema"` read a histogram with 2,048 bins for each sign; where a value exceeds it,
    its bins are merged in pairs, so that it always covers what was seen.

    Args:
        bits: Bits per code.
        symmetric: Whether the zero point is fixed in the middle.
        method: See `find_range`.

    Example:
        >>> observer = Observer(bits=8, symmetric=False)
        >>> observer.update(torch.tensor([0.0, 3.0]))
        >>> observer.update(torch.tensor([-1.0, 2.0]))
        >>> [end.item() for end in observer.find_range()]
        [-1.0, 3.0]
    """

    def __init__(self, bits: int, symmetric: bool, method: str = "minmax") -> None:
        self.bits, self.symmetric, self.method = bits, symmetric, method
        self._ends: tuple[Tensor, Tensor] | None = None
        self._counts: Tensor | None = None  # [2, bins], magnitudes of positive and of negative values
        self._limit = 0.0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Look at one more input, of any shape; an empty one changes nothing."""
        if not x.numel():
            return
        values = x.detach().flatten().float()
        low, high = find_range(values, self.bits, self.symmetric)
        if self._ends is None:
            self._ends = low, high
        elif self.method == "ema":
            self._ends = self._ends[0].lerp(low, _MOMENTUM), self._ends[1].lerp(high, _MOMENTUM)
        else:
            self._ends = torch.minimum(self._ends[0], low), torch.maximum(self._ends[1], high)
        if self.method not in ("minmax", "ema"):
            self._count(values, max(-low.item(), high.item()))

    def find_range(self) -> tuple[Tensor, Tensor]:
        """Return low and high, float32 `[]`, with `low <= 0 <= high`.

        Raises:
            RuntimeError: Nothing was seen, or something that is not finite.
        """
        if self._ends is None:
            raise RuntimeError("no input has reached it")
        if not all(torch.isfinite(end) for end in self._ends):
            raise RuntimeError("its inputs hold NaN or Inf")
        if self._counts is None:
            return self._ends
        centers = (torch.arange(_BINS, device=self._counts.device) + 0.5) * (self._limit / _BINS)
        values = torch.stack([centers, -centers]).flatten()
        counts = self._counts.flatten()
        low, high = find_range(values[counts > 0], self.bits, self.symmetric, self.method, counts[counts > 0])
        return torch.maximum(low, self._ends[0]), torch.minimum(high, self._ends[1])

    def _count(self, values: Tensor, largest: float) -> None:
        if not largest < torch.inf:
            return
        if self._counts is None:
            self._counts, self._limit = (
                values.new_zeros(2, _BINS),
                max(largest, _BINS * torch.finfo(torch.float32).tiny),
            )
        while largest > self._limit:
            merged = self._counts.view(2, -1, 2).sum(dim=2)
            self._counts, self._limit = torch.nn.functional.pad(merged, (0, _BINS // 2)), 2 * self._limit
        bins = (values.abs() * (_BINS / self._limit)).long().clamp_(max=_BINS - 1) + (values < 0) * _BINS
        self._counts += torch.bincount(bins, minlength=2 * _BINS).view(2, -1)
