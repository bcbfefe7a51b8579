"""Schedules of the noise rate: callables from the progress of the training in [0, 1] to a rate in [0, 1]."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


def check_rate(rate: float, name: str = "rate") -> float:
    """Return `rate`.

    Raises:
        ValueError: It lies outside [0, 1] or is NaN.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {rate}")
    return rate


class RateSchedule(ABC):
    """Base of the schedules, so that a command line can name them; any callable `float -> float` serves as well."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the rate at `progress`, 0 at the first batch of the fit and 1 at its end."""


@dataclass(frozen=True)
class ConstantRate(RateSchedule):
    """The same rate throughout.

    Example:
        >>> ConstantRate(0.1)(0.5)
        0.1
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def __call__(self, progress: float) -> float:
        """Return the rate."""
        return self.rate


@dataclass(frozen=True)
class LinearRate(RateSchedule):
    """From `start` to `end` in a straight line, over the part of the training between `begin` and `finish`.

    Example:
        >>> LinearRate(0.0, 0.5)(0.5)
        0.25
    """

    start: float = 0.0
    end: float = 0.1
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        check_rate(self.start, "start")
        check_rate(self.end, "end")
        if not 0 <= self.begin < self.finish <= 1:
            raise ValueError(f"expected 0 <= begin < finish <= 1, got begin={self.begin}, finish={self.finish}")

    def __call__(self, progress: float) -> float:
        """Return the rate at `progress`."""
        return self.start + (self.end - self.start) * self._shape(self._fraction(progress))

    def _fraction(self, progress: float) -> float:
        return min(max((progress - self.begin) / (self.finish - self.begin), 0.0), 1.0)

    @staticmethod
    def _shape(fraction: float) -> float:
        return fraction


@dataclass(frozen=True)
class CosineRate(LinearRate):
    """From `start` to `end` along half a cosine: flat at both ends.

    Example:
        >>> round(CosineRate(0.0, 0.5)(0.5), 6)
        0.25
    """

    @staticmethod
    def _shape(fraction: float) -> float:
        return (1 - math.cos(math.pi * fraction)) / 2


@dataclass(frozen=True)
class WarmupCosine(RateSchedule):
    """From 0 in a straight line to 1 over the first `warmup` of the training, and along half a cosine back to 0.

    As a factor of a learning rate; `Finetune` uses it.

    Example:
        >>> schedule = WarmupCosine(warmup=0.1)
        >>> [round(schedule(progress), 3) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    warmup: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {self.warmup}")

    def __call__(self, progress: float) -> float:
        """Return the factor at `progress`."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        return (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))) / 2


@dataclass(frozen=True)
class StepRate(RateSchedule):
    """Piecewise constant: `rates[i]` from `milestones[i - 1]` on.

    Args:
        rates: One rate more than milestones.
        milestones: Increasing fractions of the training.

    Example:
        >>> rate = StepRate(rates=[0.0, 0.1, 0.5], milestones=[0.5, 0.9])
        >>> rate(0.2), rate(0.5), rate(1.0)
        (0.0, 0.1, 0.5)
    """

    rates: Sequence[float]
    milestones: Sequence[float]

    def __post_init__(self) -> None:
        for rate in self.rates:
            check_rate(rate)
        if len(self.rates) != len(self.milestones) + 1:
            raise ValueError(f"expected one rate more than milestones, got {self.rates} and {self.milestones}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(not 0 <= m <= 1 for m in self.milestones):
            raise ValueError(f"milestones must increase within [0, 1], got {self.milestones}")

    def __call__(self, progress: float) -> float:
        """Return the rate at `progress`."""
        return self.rates[bisect_right(self.milestones, progress)]
