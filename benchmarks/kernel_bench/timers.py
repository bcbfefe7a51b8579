"""How long calls take on one core of a CPU, and what memory. The variants of a case take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile

from kernel_bench.variants import Call, Variant

CPU_FEWEST, CPU_MOST, CPU_SECONDS = 3, 20, 0.005


@dataclass
class Timed:
    """What was found of one variant in one mode: `us`, or what is wrong with it (`fault`), or why it was not run."""

    variant: Variant
    cache: str
    mode: str
    us: list[float] = field(default_factory=list)  # of a call, one for every turn
    fault: str = ""
    reason: str = ""


class CpuTimer:
    """Processor time of the one thread: in every turn the fastest of three calls in a row, of up to 20 within 5 ms.

    The first of them fetch the weight into the cache. Every other turn goes backwards, since who comes after a variant
    with much or little memory finds another cache.
    """

    turns, clocks = 11, ""

    def rotated(self) -> int:
        """Return the bytes that the copies of a weight have to take together: there is one."""
        return 0

    def peak(self, call: Call) -> int:
        """Return the most bytes that a call holds at once, its result included."""
        return peak_bytes(call)

    def measure(self, variants: Sequence[Variant], turns: int) -> list[Timed]:
        """Time variants."""
        found = [Timed(variant, "warm", "eager") for variant in variants]
        for turn in range(turns):
            for timed in found if turn % 2 == 0 else found[::-1]:
                seconds: list[float] = []
                while len(seconds) < CPU_FEWEST or (sum(seconds) < CPU_SECONDS and len(seconds) < CPU_MOST):
                    seconds.append(_thread_seconds(timed.variant.calls[0]))
                timed.us.append(1e6 * min(seconds))
        return found

    def settle(self) -> None:
        """A CPU is never lost."""


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that a call holds at once on a CPU, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = highest = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def _thread_seconds(call: Call) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start
