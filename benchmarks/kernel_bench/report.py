"""What is told: lines on the terminal and rows in the CSV file."""

from __future__ import annotations

import csv
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kernel_bench.cases import BLOCK, CODEWORDS, Case
from kernel_bench.cuda_timer import smi

Row = dict[str, object]
TOLD = ["pass", "out", "in", "M", "dtype", "variant", "detail", "cache", "mode", "us", "ratio", "GB_per_s", "peak_MiB"]
FIELDS = ["pass", "out", "in", "K", "d", "M", "dtype", "variant", "detail", "cache", "mode", "us", "us_p20", "us_p80"]
FIELDS += ["ratio", "bytes", "GB_per_s", "peak_MiB", "memory_over_file", "turns", "sm_MHz"]
FIELDS += ["device", "threads", "driver", "cuda", "torch", "triton"]


class Report:
    """Collects rows and refusals, and writes every row at once.

    Args:
        device: `"cpu"` or `"cuda"`.
        path: The CSV file.
    """

    def __init__(self, device: str, path: Path) -> None:
        self.machine, self.path = machine(device), path
        self.rows: list[Row] = []
        self.reds = self._written = 0

    def columns(self, case: Case) -> Row:
        """Return what the rows of a case have in common."""
        sizes = {"pass": case.task, "out": case.n_out, "in": case.n_in, "K": CODEWORDS, "d": BLOCK, "M": case.rows}
        return sizes | {"dtype": str(case.dtype).removeprefix("torch.")} | self.machine

    def row(self, row: Row) -> None:
        """Tell a result."""
        self.rows.append(row)
        print(*(row[name] for name in TOLD), sep="  ", flush=True)

    def red(self, case: Case, variant: str, reason: str) -> None:
        """Tell a result that is wrong and therefore is not reported."""
        self.reds += 1
        print(f"RED  {case}  {variant}: {_line(reason)}", flush=True)

    def not_run(self, case: Case, variant: str, reason: str) -> None:
        """Tell what cannot be measured."""
        print(f"not run  {case}  {variant}: {_line(reason)}", flush=True)

    def flush(self) -> None:
        """Write the rows since the last time."""
        with self.path.open("a" if self._written else "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if not self._written:
                writer.writeheader()
            writer.writerows(self.rows[self._written :])
        self._written = len(self.rows)


def machine(device: str) -> Row:
    """Return what is measured on, and with which versions."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    versions = {"cuda": torch.version.cuda or "", "torch": torch.__version__, "triton": triton}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "threads": "", "driver": smi("driver_version")} | versions
    return {"device": processor(), "threads": torch.get_num_threads(), "driver": ""} | versions


def processor() -> str:
    """Return the processor's name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def _line(reason: str) -> str:
    return reason.strip().partition("\n")[0][:200] or "no reason given"
