"""The paper's Table 1 and Table 3 on two small real tasks: scheme by method, quality at equal bytes and equal steps.

`python benchmarks/table1.py --data <folder of data sets>` trains what is missing, cell by cell, and writes
`results/table1.csv` and `results/table1.png`. Interrupted, it goes on where it stopped. `--task`, `--cell` and `--seed`
choose a part, `--list` names the cells. A model that several cells start from is trained once and kept in `--work`.

Every cell is measured once, on the model loaded from its packed file; nothing is chosen on test data. The integer
cells compress weights only.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tasks import TASKS
from tasks.report import report

from lightning_qnoise import Finetune, Int, Quantize, QuantNoise, load, quantize, save, size_table
from lightning_qnoise.policy import Policy

RESULTS = Path(__file__).parent / "results"
FIELDS = ["task", "cell", "seed", "metric", "bytes", "file_bytes", "seconds", "threads", "torch"]


@dataclass(frozen=True)
class Base:
    """A trained float model: with which noise, at which rate."""

    noise: str | None = None
    rate: float = 0.0
    kind: str = "exact"

    @property
    def name(self) -> str:
        return f"{self.noise}-{self.kind}-{self.rate:g}" if self.noise else "float"


@dataclass(frozen=True)
class Cell:
    """What a base becomes.

    Attributes:
        base: The model trained before.
        policy: "int8", "int4", or the size of product quantization: "L", "S", "XS", with "+int8" for int8 codebooks
            and activations; None leaves it float.
        steps: Part of the task's finetuning steps that the stage takes; 0 packs in one shot.
        noise_steps: Part of them that is spent before on finetuning the base with noise.
        finetune: Further settings of the stage.
    """

    base: Base
    policy: str | None = None
    steps: float = 0.0
    noise_steps: float = 0.0
    finetune: Mapping[str, Any] | None = None


def _cells(task: Any) -> dict[str, Cell]:
    float_, rate = Base(), task.noise_rate
    cells = {"float": Cell(float_), "float, same extra steps": Cell(float_, None, steps=1.0)}
    for policy in ("int8", "int4"):
        for method, base in (("PTQ", float_), ("QAT", Base(policy, 1.0)), ("Quant-Noise", Base(policy, 0.5))):
            cells[f"{policy} {method}"] = Cell(base, policy)
    for size in ("L", "S"):
        for method, base in (("float", float_), ("QAT", Base(size, 1.0)), ("Quant-Noise", Base(size, rate))):
            cells[f"{size}: PQ one shot from {method}"] = Cell(base, size)
            alone = {"guidance": None} if method == "QAT" else None  # QAT leaves no float model that could teach
            cells[f"{size}: iPQ from {method}"] = Cell(base, size, steps=1.0, finetune=alone)
        cells[f"{size}: iPQ from float finetuned with noise"] = Cell(float_, size, steps=0.5, noise_steps=0.5)
        cells[f"{size}: iPQ as published from float"] = Cell(
            float_, size, steps=1.0, finetune={"reassign": False, "guidance": None, "dropout": True}
        )
        cells[f"{size}: iPQ + int8 from float"] = Cell(float_, f"{size}+int8", steps=1.0)
    return cells


class Runner:
    """Trains and measures the cells of one task and seed."""

    def __init__(self, task: Any, seed: int, work: Path) -> None:
        self.task, self.seed, self.work = task, seed, work / task.name / str(seed)

    def run(self, name: str, cell: Cell) -> dict[str, Any]:
        """Return a row of the table."""
        start = time.perf_counter()
        module = self.base(cell.base)
        path = self.work / f"{name.replace(':', '').replace(' ', '-')}.safetensors"
        if cell.noise_steps:
            noise = self.noise(Base(cell.policy, self.task.noise_rate))
            self.fit(module, [noise], offset=1, max_steps=round(cell.noise_steps * self.task.finetune_steps))
        if cell.policy is None:
            if cell.steps:
                module.lr /= 3  # as in the reference's row
                self.fit(module, [], offset=1, max_steps=round(cell.steps * self.task.finetune_steps))
            table, loaded, n_file = size_table(module), module, None
        else:
            self.compress(module, cell, path)
            loaded = load(self.task.module(), path)
            table, n_file = size_table(loaded), path.stat().st_size
        return {
            "task": self.task.name,
            "cell": name,
            "seed": self.seed,
            "metric": round(self.test(loaded), 3),
            "bytes": table.bytes,
            "file_bytes": n_file,
            "seconds": round(time.perf_counter() - start, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def base(self, base: Base) -> pl.LightningModule:
        """Return a trained model, from the disk where it has been trained before."""
        path = self.work / f"{base.name}.ckpt"
        pl.seed_everything(self.seed, verbose=False)
        module = self.task.module()
        if path.exists():
            module.load_state_dict(torch.load(path, weights_only=True))
            return module
        self.fit(module, [self.noise(base)] if base.noise else [], offset=0, max_epochs=self.task.epochs)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), path)
        return module

    def noise(self, base: Base) -> QuantNoise:
        """Return the noise that a base is trained with."""
        assert base.noise is not None
        return QuantNoise(self.policy(base.noise), base.rate, kind=base.kind, refresh=self.task.refresh)

    def policy(self, name: str) -> Policy:
        """Return the policy of a cell."""
        if name.startswith("int"):
            return Int(bits=int(name[3:]))
        size, _, extra = name.partition("+")
        int8 = {"codebook": Int(8, "tensor"), "activation": Int(8)} if extra else {}
        return {glob: scheme and replace(scheme, **int8) for glob, scheme in self.task.pq(size).items()}

    def compress(self, module: pl.LightningModule, cell: Cell, path: Path) -> None:
        """Write the packed file of a cell."""
        assert cell.policy is not None
        policy, steps = self.policy(cell.policy), round(cell.steps * self.task.finetune_steps)
        if steps:
            settings = Finetune(steps=steps, **(cell.finetune or {}))
            callback = Quantize(policy, "joint", settings, path=str(path.absolute()), evaluate=False)
            self.fit(module, [callback], offset=2, max_epochs=0)
            return
        quantize(module, policy)
        torch.optim.swa_utils.update_bn(islice(self.task.train_batches(self.seed).loader(), 100), module)
        save(module, path)

    def fit(self, module: pl.LightningModule, callbacks: list[pl.Callback], offset: int, **limits: int) -> None:
        """Train, with other batches for every offset."""
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=callbacks,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **limits,
        )
        pl.seed_everything(1000 * self.seed + offset, verbose=False)
        trainer.fit(module, self.task.train_batches(1000 + 10 * self.seed + offset).loader())

    def test(self, module: pl.LightningModule) -> float:
        """Return the metric on the test data."""
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", **options)
        return trainer.test(module, self.task.test_batches().loader(), verbose=False)[0]["test/metric"]


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows measured so far."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to the file, which is whole after every cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Measure what is missing, print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds fashion-mnist/ and wikitext-2/")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--cell", nargs="+", help="names as --list prints them, or parts of names")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("table1-work"), help="where trained models are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "table1.csv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    arguments = parser.parse_args()
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    for name in arguments.task:
        cells = {c: cell for c, cell in _cells(TASKS[name]).items() if _chosen(c, arguments.cell)}
        if arguments.list:
            print("\n".join(f"{name}  {cell}" for cell in cells))
            continue
        done = {(row["task"], row["cell"], int(row["seed"])) for row in read(arguments.out)}
        todo = [(seed, cell) for seed in arguments.seed for cell in cells if (name, cell, seed) not in done]
        if todo and arguments.data is None:
            print(f"{len(todo)} cells of the {name} task are missing: pass --data to measure them")
            continue
        task = TASKS[name](arguments.data, arguments.work) if todo else None
        for seed, cell in todo:
            row = Runner(task, seed, arguments.work).run(cell, cells[cell])
            append(arguments.out, row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if not arguments.list:
        report(read(arguments.out), arguments.out)


def _chosen(name: str, parts: list[str] | None) -> bool:
    return parts is None or any(part in name for part in parts)


if __name__ == "__main__":
    main()
