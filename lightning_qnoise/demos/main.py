"""Two real models, four schemes, three methods: a table, a CSV and a picture of size against quality."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_qnoise.commands import file_size
from lightning_qnoise.demos import report
from lightning_qnoise.demos.compare import N_FITS, TASKS, Cell, Task, run
from lightning_qnoise.demos.evaluate import evaluate_elsewhere


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser("python -m lightning_qnoise.demos", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for files and results")
    arguments = parser.parse_args()
    start = time.perf_counter()
    console = Console()
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    results: list[report.Result] = []
    with Progress(*columns, console=console) as progress:
        for name in arguments.tasks:
            results += run_task(TASKS[name], arguments.out / name, progress)
            shown = [result for result in results if result.task == name]
            console.print(report.table(shown, f"{name}: measured on the reloaded packed files"))
    report.write_csv(results, arguments.out / "results.csv")
    report.picture(results, arguments.out / "results.png")
    console.print(f"{time.perf_counter() - start:.0f} s; files, results.csv and results.png are in {arguments.out}/")


def run_task(task: Task, folder: Path, progress: Progress) -> list[report.Result]:
    """Train, pack, reload in another process and measure all cells of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress.add_task(f"{task.name}: training", total=N_FITS)
    cells: list[tuple[Cell, float]] = []
    for cell, seconds in run(task, folder, lambda fraction: progress.advance(bar, fraction)):
        cells.append((cell, seconds))
        progress.update(bar, description=f"{task.name}: {cell.scheme} {cell.method} done")
    progress.update(bar, description=f"{task.name}: testing", completed=N_FITS)
    values = evaluate_elsewhere(task.name, folder)
    progress.update(bar, description=f"{task.name}: done")
    results = []
    for cell, seconds in cells:
        size, value = file_size(folder / cell.file), values[cell.file]
        row = (cell.scheme, cell.method, cell.rate, size.bytes, size.compression, task.title, value, seconds)
        results.append(report.Result(task.name, *row))
    return results
