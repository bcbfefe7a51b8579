"""Products with a product-quantized matrix on one CPU core, by every route, against the dense `F.linear` in float32.

`python benchmarks/pq_cpu.py` prints a row per size, number of rows of `x` and route, and writes `results/pq_cpu.csv`
here. A ratio above 1 is faster than dense. `pq_linear` is the operator as it is called, with the route it chooses;
`decode + linear` makes the dense matrix at every call. All are checked against the product in float64, and a product
that is wrong ends the run. They take turns, each with a few calls in a row, of which the fastest counts; a row holds
the medians over the turns of processor time. "MiB" is what a route holds at its peak besides `x`, codes and codebook.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_qnoise.ops import pq_cpu
from lightning_qnoise.ops.pq import pq_decode, pq_linear

SIZES = [(4096, 4096), (1024, 1024), (768, 3072), (3072, 768)]
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
CODEWORDS, BLOCK = 256, 8
CALLS = 3


def processor() -> str:
    """The processor's name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def routes(x: Tensor, weight: Tensor, codes: Tensor, codebook: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what is compared."""
    found = {
        "dense": lambda: F.linear(x, weight),
        "pq_linear": lambda: pq_linear(x, codes, codebook),
        "decode + linear": lambda: F.linear(x, pq_decode(codes, codebook, x.dtype)),
        "decode": lambda: pq_cpu.linear(x, codes, codebook, "decode"),
        "lookup": lambda: pq_cpu.linear(x, codes, codebook, "lookup"),
        "gather": lambda: pq_cpu.linear(x, codes, codebook, "gather"),
    }
    return {name: route for name, route in found.items() if name != "gather" or len(x) <= 8}


def check(name: str, y: Tensor, expected: Tensor) -> None:
    """Refuse a wrong product."""
    error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
    if not error < 1e-5:
        raise SystemExit(f"{name} is wrong: relative error {error:.1e}")


def peak(route: Callable[[], Tensor]) -> float:
    """Return the MiB that a route holds at its peak, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        route()
    held = highest = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest / 2**20


def in_turns(compared: dict[str, Callable[[], Tensor]], turns: int) -> dict[str, float]:
    """Return the median milliseconds over the turns, of the fastest call in each."""
    fastest = {name: [] for name in compared}
    for _ in range(turns):
        for name, route in compared.items():
            seconds = []
            for _ in range(CALLS):
                start = time.thread_time()
                route()
                seconds.append(time.thread_time() - start)
            fastest[name].append(1000 * min(seconds))
    return {name: statistics.median(values) for name, values in fastest.items()}


@torch.inference_mode()
def measure(n_out: int, n_in: int, rows: int, turns: int) -> list[dict[str, object]]:
    """Return a table row per route."""
    torch.manual_seed(0)
    codes = torch.randint(CODEWORDS, (n_out, n_in // BLOCK), dtype=torch.uint8)
    codebook, x = torch.randn(CODEWORDS, BLOCK).half(), torch.randn(rows, n_in)
    weight = codebook.float()[codes.long()].flatten(1)
    compared = routes(x, weight, codes, codebook)
    expected = x.double() @ weight.double().t()
    for name, route in compared.items():
        check(name, route(), expected)
    ms = in_turns(compared, turns)
    return [
        {
            "out": n_out,
            "in": n_in,
            "rows": rows,
            "route": name,
            "chosen": pq_cpu.choose_route(rows, n_out, CODEWORDS, BLOCK) if name == "pq_linear" else "",
            "ms": round(ms[name], 3),
            "dense_ms": round(ms["dense"], 3),
            "ratio": round(ms["dense"] / ms[name], 2),
            "MiB": round(peak(route), 2),
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "torch": torch.__version__,
        }
        for name, route in compared.items()
        if name != "dense"
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pq_cpu.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for n_out, n_in in SIZES:
        for rows in ROWS:
            for row in measure(n_out, n_in, rows, arguments.turns):
                print(*list(row.values())[:9], sep="  ", flush=True)
                found.append(row)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
