"""How long calls take on a GPU, and what memory. The variants of a case take turns.

There are three ways. "graph": a CUDA graph of 100 calls, or of as many as take 20 ms, is replayed 20 times, or
for 0.1 s but 5 times at least, between two events; "cold" goes through all copies of the weight in whole rounds, "warm"
stays with the first. The output of the last call, overwritten before, is checked after a replay. "eager": calls one
after another from Python, cold, by the clock of the host. Where a graph would take longer than 0.4 s there is none.
"""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_bench.timers import Timed
from kernel_bench.variants import Call, Variant, fault_in, poison

GRAPH_CALLS, GRAPH_SECONDS, GRAPH_LONGEST = 100, 0.02, 0.4
REPLAYS_SECONDS, FEWEST_REPLAYS = 0.1, 5
EAGER_CALLS, EAGER_SECONDS = 30, 0.005  # a call that takes longer is not repeated


class Run(NamedTuple):
    """Something to time, `n` calls at once."""

    timed: Timed
    go: Callable[[], object]
    n: int
    turns: int


class CudaTimer:
    """Time on the GPU, all of it on one stream."""

    turns = 20

    def __init__(self) -> None:
        gc.freeze()  # before torch 2.9 every capture collects garbage
        self.stream, self.clocks = torch.cuda.Stream(), ""

    def rotated(self) -> int:
        """Return the bytes that the copies of a weight have to take together: four times the L2 cache."""
        return 4 * torch.cuda.get_device_properties().L2_cache_size

    def peak(self, call: Call) -> int:
        """Return the most bytes that a call holds at once, its result included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def measure(self, variants: Sequence[Variant], turns: int) -> list[Timed]:
        """Time variants, which have been called before, in all modes."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            seconds = {variant.name: self._seconds(variant) for variant in variants}
            found = self._graphs([variant for variant in variants if variant.rotates], seconds, "cold", turns)
            self.clocks = smi("clocks.sm")
            found += self._graphs(variants, seconds, "warm", turns) + self._eager(variants, seconds, turns)
        torch.cuda.synchronize()
        return found

    def settle(self) -> None:
        """Raise if the device is lost."""
        torch.cuda.synchronize()

    def _seconds(self, variant: Variant) -> float:
        variant.calls[0]()
        return min(_host_seconds(variant.calls, 3) for _ in range(3)) / 3

    def _graphs(self, variants: Sequence[Variant], seconds: dict[str, float], cache: str, turns: int) -> list[Timed]:
        found, runs = [], []
        for variant in variants:
            calls = variant.calls if cache == "cold" else variant.calls[:1]
            n = graph_calls(seconds[variant.name], len(calls))
            found.append(timed := Timed(variant, cache, "graph"))
            if n * seconds[variant.name] > GRAPH_LONGEST:
                timed.reason = f"no CUDA graph: {len(calls)} calls of {1000 * seconds[variant.name]:.1f} ms"
                continue
            try:
                graph, y = self._capture(calls, n)
            except Exception as error:  # whatever a peer does that no graph can hold
                self.settle()
                timed.reason = f"no CUDA graph: {error}"
                continue
            poison(y)
            replay = _host_seconds([graph.replay], 1)
            timed.fault = fault_in(variant, y, len(calls) - 1)
            if not timed.fault:
                most = max(FEWEST_REPLAYS, int(REPLAYS_SECONDS / replay))
                runs.append(Run(timed, graph.replay, n, min(turns, most)))
        _replay(runs, turns)
        return found

    def _capture(self, calls: Sequence[Call], n: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(n):
                y = calls[i % len(calls)]()
        return graph, y

    def _eager(self, variants: Sequence[Variant], seconds: dict[str, float], turns: int) -> list[Timed]:
        found = [Timed(variant, "cold" if variant.rotates else "warm", "eager") for variant in variants]
        for turn in range(max(3, turns // 4)):
            for timed in found:
                n = 1 if seconds[timed.variant.name] > EAGER_SECONDS else EAGER_CALLS
                if n > 1 or turn < 3:
                    timed.us.append(1e6 * _host_seconds(timed.variant.calls, n) / n)
        return found


def graph_calls(seconds: float, copies: int) -> int:
    """Return how many calls of so many seconds a graph holds: whole rounds through the copies."""
    n = max(1, min(GRAPH_CALLS, int(GRAPH_SECONDS / seconds)))
    return -(-max(n, copies) // copies) * copies


def smi(query: str) -> str:
    """Ask nvidia-smi about the GPU; an empty string where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _replay(runs: Sequence[Run], turns: int) -> None:
    for turn in range(turns):
        now = [run for run in runs if turn < run.turns]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in now]
        if now:
            now[-1].go()  # while it runs, the host gets ahead
        for run, (start, stop) in zip(now, events, strict=True):
            start.record()
            run.go()
            stop.record()
        torch.cuda.synchronize()
        for run, (start, stop) in zip(now, events, strict=True):
            run.timed.us.append(1000 * start.elapsed_time(stop) / run.n)


def _host_seconds(calls: Sequence[Call], n: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(n):
        calls[i % len(calls)]()
    torch.cuda.synchronize()
    return time.perf_counter() - start
