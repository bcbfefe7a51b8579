"""Where Quant-Noise pays and where it does not: quality against the rate, at equal bytes and equal steps.

`python benchmarks/noise_pays.py --data <folder of data sets>` measures what is missing, cell by cell, and writes
`results/noise_pays.csv` and `results/noise_pays.png`. Interrupted, it goes on where it stopped. `--task`, `--cell` and
`--seed` choose a part, `--list` names the cells. Models that several cells start from are kept in `--work`, where those
of `table1.py` serve as well.

Rate 0 is quantization after training, rate 1 quantization-aware training; all rates of a setting take the same steps.
Nothing is chosen here; a rate to be recommended is read off seed 0, so that seeds 1 and 2 confirm it.
"iPQ" is the published one (fixed codes, no teacher), "iPQ, our default" is `Finetune()`, whose teacher is the model as
it was trained, read without noise and with BatchNorm statistics estimated anew.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytorch_lightning as pl
import table1
import torch
from table1 import RESULTS, Base, Cell, append, read
from tasks import TASKS

REFRESH = 20  # steps between two clusterings while a trained model is finetuned with noise
PUBLISHED = {"reassign": False, "guidance": None, "dropout": True}


@dataclass(frozen=True)
class Tuned(Base):
    """The float model, finetuned with noise at the task's own peak learning rate.

    Attributes:
        steps: Part of the task's finetuning steps.
    """

    steps: float = 1.0

    @property
    def name(self) -> str:
        return f"tuned-{self.noise}-{self.kind}-{self.rate:g}-{self.steps:g}"


@dataclass(frozen=True)
class Setting:
    """A panel of the picture: one way from the float model to the file, at several rates and kinds of noise.

    Attributes:
        rates: The rates of every kind; rate 0 is common to all.
        size: The size of product quantization.
        steps: Part of the task's finetuning steps that iPQ takes; 0 packs in one shot.
        tuned: Part of them that go to finetuning the float model with noise; 0 trains with noise from the start.
        finetune: Settings of iPQ.
    """

    rates: Mapping[str, Sequence[float]]
    size: str
    steps: float
    tuned: float = 0.0
    finetune: Mapping[str, Any] | None = None

    def cell(self, kind: str, rate: float) -> Cell:
        """Return one point of the panel."""
        if self.tuned:
            base: Base = Tuned(self.size, rate, kind, self.tuned)
        else:
            base = Base(self.size, rate, kind) if rate else Base()
        return Cell(base, self.size, self.steps, finetune=self.finetune)

    def cells(self, name: str) -> dict[str, Cell]:
        """Return all points by name."""
        points = [("exact", 0.0), *((kind, rate) for kind, rates in self.rates.items() for rate in rates)]
        return {point(name, kind, rate): self.cell(kind, rate) for kind, rate in points}


def point(setting: str, kind: str, rate: float) -> str:
    """Return the name of a cell."""
    return f"{setting}: {kind} {rate:g}" if rate else f"{setting}: rate 0"


ALL_KINDS = {"exact": (0.1, 0.3, 0.5, 1.0), "zero": (0.1,), "mean": (0.1,)}
SWEEP = {"exact": (0.1, 0.3, 0.5, 0.8, 1.0), "zero": (0.1, 0.3, 0.5, 0.8), "mean": (0.1, 0.3, 0.5, 0.8)}
SETTINGS = {
    "image": {
        "XS trained with noise, iPQ": Setting(ALL_KINDS, "XS", 1.0, finetune=PUBLISHED),
        "XS trained with noise, iPQ, our default": Setting({"exact": (0.1, 0.3, 0.5, 1.0)}, "XS", 1.0),
        "XS trained with noise, iPQ, our default without teacher": Setting(
            {"exact": (0.5, 1.0)}, "XS", 1.0, finetune={"guidance": None}
        ),
    },
    "text": {
        "XS trained with noise, iPQ": Setting(SWEEP, "XS", 1.0, finetune=PUBLISHED),
        "XS trained with noise, iPQ, our default": Setting({"exact": (0.5, 1.0)}, "XS", 1.0),
        "S trained with noise, iPQ": Setting({"exact": (0.05, 0.3, 1.0)}, "S", 1.0, finetune=PUBLISHED),
        "S finetuned with noise, one shot": Setting({"exact": (0.8, 1.0)}, "S", 0.0, 1.0),
    },
}


class Runner(table1.Runner):
    """Knows a further kind of base: a trained model that is finetuned with noise."""

    def base(self, base: Base) -> pl.LightningModule:
        """Return a trained model, from the disk where it has been trained before."""
        if not isinstance(base, Tuned):
            return super().base(base)
        path = self.work / f"{base.name}.ckpt"
        module = super().base(Base())
        if path.exists():
            module.load_state_dict(torch.load(path, weights_only=True))
            return module
        noise = self.noise(base)
        noise.refresh = REFRESH
        steps = round(base.steps * self.task.finetune_steps)
        self.fit(module, [noise] if base.rate else [], offset=1, max_steps=steps)
        torch.save(module.state_dict(), path)
        return module


def report(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Print mean and spread of every cell and draw the metric against the rate, one panel a setting.

    Lines of other kinds that go far beyond the exact kind's range leave their panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["cell"]), []).append(float(row["metric"]))
    panels = [(task, name) for task, settings in SETTINGS.items() for name in settings]
    n_columns = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, n_columns, figsize=(4.6 * n_columns, 7.5), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (task, name) in zip(axes.flat, panels, strict=False):
        setting = SETTINGS[task][name]
        for cell in setting.cells(name):
            if values := groups.get((task, cell)):
                spread = f"{stdev(values):.2f}" if len(values) > 1 else "-"
                print(f"{task:6}{cell:72}{mean(values):9.2f} +- {spread:6} n={len(values)}")
        start = groups.get((task, point(name, "exact", 0.0)))
        if start:
            axis.axhline(mean(start), color="0.5", ls="--", lw=1, label="rate 0: after training")
        for colour, (kind, rates) in zip(("C0", "C1", "C2"), setting.rates.items(), strict=False):
            measured = [(rate, groups.get((task, point(name, kind, rate)))) for rate in (0.0, *rates)]
            points = [(rate, values) for rate, values in measured if values]
            if points:
                x, y = [rate for rate, _ in points], [mean(values) for _, values in points]
                spreads = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                axis.errorbar(x, y, spreads, color=colour, marker="o", ms=4, capsize=3, label=kind)
                if x[-1] == 1:
                    axis.plot(1, y[-1], "s", color="C3", ms=8, zorder=3, label="rate 1: QAT")
            if kind == "exact":
                low, high = axis.get_ylim()  # sets the scale of the panel
        least, most = axis.dataLim.intervaly
        axis.set_ylim(min(low, max(least, 2 * low - high)), max(high, min(most, 2 * high - low)))
        better = "top-1 % (higher is better)" if task == "image" else "perplexity (lower is better)"
        axis.set(xlabel="rate", title=f"{task}: {name}", ylabel=better)
        axis.title.set_fontsize(8)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    """Measure what is missing, print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds fashion-mnist/ and wikitext-2/")
    parser.add_argument("--task", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--cell", nargs="+", help="names as --list prints them, or parts of names")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("table1-work"), help="where trained models are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "noise_pays.csv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    arguments = parser.parse_args()
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    for name in arguments.task:
        every = {cell: value for title, s in SETTINGS[name].items() for cell, value in s.cells(title).items()}
        cells = {c: v for c, v in every.items() if not arguments.cell or any(part in c for part in arguments.cell)}
        if arguments.list:
            print("\n".join(f"{name}  {cell}" for cell in cells))
            continue
        done = {(row["task"], row["cell"], int(row["seed"])) for row in read(arguments.out)}
        todo = [(seed, cell) for seed in arguments.seed for cell in cells if (name, cell, seed) not in done]
        if todo and arguments.data is None:
            parser.error(f"{len(todo)} cells of the {name} task are missing: pass --data, or --list to see them")
        task = TASKS[name](arguments.data, arguments.work) if todo else None
        for seed, cell in todo:
            row = Runner(task, seed, arguments.work).run(cell, cells[cell])
            append(arguments.out, row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if not arguments.list:
        report(read(arguments.out), arguments.out)


if __name__ == "__main__":
    main()
