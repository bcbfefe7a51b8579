"""The demo's results as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.table import Table

from lightning_qnoise.demos.compare import FLOAT, TASKS

_COLORS = {FLOAT: "black", "int8": "tab:blue", "int4": "tab:green", "pq": "tab:orange", "ipq": "tab:red"}
_MARKERS = {FLOAT: "*", "post-training": "x", "QAT": "s", "Quant-Noise": "o"}


@dataclass(frozen=True)
class Result:
    """One row: sizes are those of the packed file's tensors, the metric is measured after loading it."""

    task: str
    scheme: str
    method: str
    rate: float | None
    bytes: int
    compression: float
    metric: str
    value: float
    seconds: float


def table(results: Sequence[Result], title: str) -> Table:
    """Return the results of one task as a table."""
    rendered = Table(title=title, title_justify="left")
    for name, justify in (("scheme", "left"), ("method", "left"), ("rate", "right"), ("MB", "right")):
        rendered.add_column(name, justify=justify)  # type: ignore[arg-type]
    rendered.add_column("ratio", justify="right")
    rendered.add_column(results[0].metric, justify="right")
    for r in results:
        rate = "-" if r.rate is None else f"{r.rate:g}"
        value = f"{100 * r.value:.2f} %" if r.metric == "accuracy" else f"{r.value:.2f}"
        rendered.add_row(r.scheme, r.method, rate, f"{r.bytes / 1e6:.3f}", f"{r.compression:.1f}x", value)
    return rendered


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write one line a result."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def picture(results: Sequence[Result], path: Path) -> None:
    """Draw size against metric, one panel a task: colour is the scheme, marker the method."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tasks = list(dict.fromkeys(result.task for result in results))
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for r in (r for r in results if r.task == task):
            axes.plot(r.bytes / 1e6, r.value, _MARKERS[r.method], color=_COLORS[r.scheme], markersize=9, alpha=0.8)
        sizes = sorted({round(r.bytes / 1e6, 3) for r in results if r.task == task})
        axes.set(xlabel="packed file (MB)", ylabel=TASKS[task].title, xscale="log", title=task)
        axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
        axes.set_xticks([], minor=True)
        if TASKS[task].title == "perplexity":
            axes.invert_yaxis()
        axes.grid(alpha=0.3)
    colors = [Line2D([], [], color=color, marker="o", ls="", label=name) for name, color in _COLORS.items()]
    markers = [Line2D([], [], color="gray", marker=m, ls="", label=n) for n, m in _MARKERS.items() if n != FLOAT]
    figure.legend(handles=colors + markers, loc="outside lower center", ncols=len(colors + markers), frameon=False)
    figure.savefig(path, dpi=120)
