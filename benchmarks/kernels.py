"""Operators on a product-quantized matrix against dense products and peers, on a GPU or on one core of a CPU.

`python benchmarks/kernels.py --device cuda` begins no other case after 8 minutes. It prints a line for every result,
writes `results/kernels_cuda.csv` and `.png` here as it goes, and ends in the bars that are met. A ratio above 1 is
faster than the dense product in the same case, mode and run; of k-means, than `addmm` and `argmin`. Before it is timed
every variant is checked against float64 on random codes, with all new memory poisoned, and what is wrong is not
reported: its line starts with RED, and the exit status is 1. How it is timed: `kernel_bench/*timer*.py`.

Passes: `forward` is `x @ W.T`, `dx` the gradient of x, `dc` that of the codebook (dense: of the matrix), `assign` the
nearest codeword of every block. "GB_per_s" counts operands and result once; "peak_MiB" is what a call holds besides
its operands, result included; "memory_over_file" is the packed weight of a layer and that peak, over its file.

Peers are in `kernel_bench/peers.py`. AQLM compiles its CUDA kernel when it is imported, for a minute or two; on a
machine lent for a limited time do it in a command of its own: `python -c "import aqlm.inference_kernels.cuda_kernel"`.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_bench.bars import bars
from kernel_bench.cases import BLOCK, CODEWORDS, Case, Weights
from kernel_bench.cuda_timer import CudaTimer
from kernel_bench.picture import draw
from kernel_bench.report import Report
from kernel_bench.run import Bench
from kernel_bench.timers import CpuTimer

PASSES = ["forward", "assign", "dx", "dc"]
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "sizes": ["4096x4096", "8192x8192", "11008x4096", "4096x11008", "768x3072", "3072x768"],
        "rows": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048],
        "dtype": ["float16"],
        "budget": 480.0,
    },
    "cpu": {
        "sizes": ["4096x4096", "1024x1024", "768x3072", "3072x768"],
        "rows": [1, 2, 4, 8, 16, 32, 64, 128, 256],
        "dtype": ["float32"],
        "budget": math.inf,
    },
}
MOST_DISTANCES = {"cuda": 2**33, "cpu": 2**27}  # bytes that `matmul + argmin` may take, all distances at once


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, with the defaults of the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", help="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of rows of x")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dtype", nargs="+", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--turns", type=int)
    parser.add_argument("--budget", type=float, help="seconds after which no other case begins")
    parser.add_argument("--out", type=Path, help="the CSV file; the picture lies beside it")
    arguments = parser.parse_args(argv)
    for size in arguments.sizes or []:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) or int(size.split("x")[1]) % BLOCK:
            parser.error(f"a size is OUTxIN with IN a multiple of {BLOCK}, got {size}")
    results = Path(__file__).parent / "results" / f"kernels_{arguments.device}.csv"
    turns = (CudaTimer if arguments.device == "cuda" else CpuTimer).turns
    for name, value in (DEFAULTS[arguments.device] | {"turns": turns, "out": results}).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def plan(arguments: argparse.Namespace, report: Report) -> Iterator[Case]:
    """Yield the cases; forward products first, in case the time is short."""
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    for task in sorted(arguments.passes, key=PASSES.index):
        for dtype in ["float32"] if task == "assign" else arguments.dtype:
            for n_out, n_in in sizes:
                points = n_out * n_in // BLOCK
                for rows in [points] if task == "assign" else arguments.rows:
                    case = Case(task, n_out, n_in, rows, getattr(torch, dtype))
                    if task == "assign" and points * CODEWORDS * 4 > MOST_DISTANCES[arguments.device]:
                        report.not_run(case, "", "all distances at once take too much memory")
                    else:
                        yield case


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw; return 1 if something was wrong."""
    start, arguments = time.monotonic(), parse(argv)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    timer = CudaTimer() if arguments.device == "cuda" else CpuTimer()
    report = Report(arguments.device, arguments.out)
    bench = Bench(timer, report, arguments.turns)
    cases, last, weights = list(plan(arguments, report)), None, None
    for done, case in enumerate(cases):
        if time.monotonic() - start > arguments.budget:
            print(f"stopped after {arguments.budget:.0f} s: {len(cases) - done} of {len(cases)} cases were not run")
            break
        key = (case.n_out, case.n_in, case.dtype)
        if key != last:
            weights = None  # before the next ones are made
            weights, last = Weights(*key, arguments.device, timer.rotated()), key
        bench.run(case, weights)
        print(f"-- {done + 1}/{len(cases)}, {time.monotonic() - start:.0f} s", flush=True)
    draw(report.rows, arguments.device, arguments.out.with_suffix(".png"))
    print(*bars(report.rows, arguments.device), sep="\n")
    if report.reds:
        print(f"{report.reds} results are wrong and not reported: see RED above")
    return int(report.reds > 0)


if __name__ == "__main__":
    raise SystemExit(main())
