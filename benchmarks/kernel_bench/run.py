"""One case: its variants are built, checked, timed, and told."""

from __future__ import annotations

import time
from statistics import quantiles

import torch

from kernel_bench import peers
from kernel_bench.cases import BASELINES, Case, Weights, assign, dc, dx, forward
from kernel_bench.cuda_timer import CudaTimer
from kernel_bench.layers import layers
from kernel_bench.report import Report
from kernel_bench.timers import CpuTimer, Timed
from kernel_bench.variants import Variant, fault_of

PEER_SECONDS = 120.0  # that one peer may take to compile, tune and pack, in all cases together


class Bench:
    """Runs cases and keeps what peers have spent.

    Args:
        timer: Of the device.
        report: Where rows and refusals go.
        turns: Of the variants of a case.
    """

    def __init__(self, timer: CpuTimer | CudaTimer, report: Report, turns: int) -> None:
        self.timer, self.report, self.turns = timer, report, turns
        self.spent: dict[str, float] = {}
        self.absent: set[str] = set()

    @torch.inference_mode()
    def run(self, case: Case, weights: Weights) -> None:
        """Measure one case."""
        variants = self._sound(case, self._ours(case, weights))
        variants += self._peers(case, weights)
        peak = {}
        for variant in variants:
            if variant.memory is not None:
                variant.memory.forget()
            peak[variant.name] = self.timer.peak(variant.calls[0])
        found = self.timer.measure(variants, self.turns)
        baselines = {
            (timed.cache, timed.mode): spread(timed.us)[1]
            for timed in found
            if timed.variant.name == BASELINES[case.task] and timed.us
        }
        for timed in found:
            if timed.fault:
                self.report.red(case, timed.variant.name, f"{timed.mode}, {timed.cache}: {timed.fault}")
            elif timed.reason:
                self.report.not_run(case, timed.variant.name, timed.reason)
            elif timed.us:
                baseline = baselines.get((timed.cache, timed.mode))
                self.report.row(self._row(case, timed, baseline, peak[timed.variant.name]))
        self.report.flush()

    def _ours(self, case: Case, weights: Weights) -> list[Variant]:
        if case.task == "assign":
            return assign(weights, case.rows)
        self._x = weights.random(case.rows, case.n_in)
        if case.task != "forward":
            return {"dx": dx, "dc": dc}[case.task](weights, self._x)
        with_layers = weights.device == "cpu" or case.rows == 1
        return forward(weights, self._x) + (layers(weights, self._x) if with_layers else [])

    def _sound(self, case: Case, variants: list[Variant]) -> list[Variant]:
        """Keep those whose results are right."""
        sound = []
        for variant in variants:
            try:
                fault = fault_of(variant)
            except Exception as error:  # an operator that raises is as wrong as one that returns nonsense
                fault = f"{type(error).__name__}: {error}"
                self.timer.settle()
            if fault:
                self.report.red(case, variant.name, fault)
            else:
                sound.append(variant)
        return sound

    def _peers(self, case: Case, weights: Weights) -> list[Variant]:
        builders = {"forward": peers.FORWARD, "dx": peers.DX}.get(case.task, {})
        sound: list[Variant] = []
        for name, build in builders.items():
            if name in self.absent:
                continue
            x, start = self._x if case.task == "forward" else weights.random(case.rows, case.n_out), time.monotonic()
            try:
                with peers.time_limit(PEER_SECONDS - self.spent.get(name, 0.0)):
                    variant = build(weights, x)
                    fault = fault_of(variant)
                sound += [] if fault else [variant]
                if fault:
                    self.report.red(case, name, fault)
            except (ImportError, TimeoutError) as error:
                self.absent.add(name)
                self.report.not_run(case, name, f"{error}; nor in what follows")
            except Exception as error:  # refuses the case
                self.report.not_run(case, name, f"{type(error).__name__}: {error}")
                self.timer.settle()
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - start
        return sound

    def _row(self, case: Case, timed: Timed, baseline: float | None, peak: int) -> dict[str, object]:
        low, median, high = spread(timed.us)
        variant = timed.variant
        memory = variant.memory and (variant.memory.held_bytes + peak) / variant.memory.file_bytes
        return {
            "variant": variant.name,
            "detail": variant.detail,
            "cache": timed.cache,
            "mode": timed.mode,
            "us": round(median, 2),
            "us_p20": round(low, 2),
            "us_p80": round(high, 2),
            "ratio": round(baseline / median, 3) if baseline else "",
            "bytes": variant.n_bytes,
            "GB_per_s": round(variant.n_bytes / median / 1000, 1),
            "peak_MiB": round(peak / 2**20, 2),
            "memory_over_file": round(memory, 3) if memory else "",
            "turns": len(timed.us),
            "sm_MHz": self.timer.clocks,
            **self.report.columns(case),
        }


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the first quintile, the median and the last quintile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
