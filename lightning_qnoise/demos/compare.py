"""The demo's experiment: every scheme by every method on one task, each result a packed file on disk."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_qnoise import Finetune, Quantize, QuantNoise, quantize, save
from lightning_qnoise.demos.digits import DigitsClassifier, DigitsData
from lightning_qnoise.demos.lm import TransformerLM
from lightning_qnoise.demos.text import ReferenceText

FLOAT, POST, QAT, NOISE = "float", "post-training", "QAT", "Quant-Noise"
RATES = {"int8": 0.5, "int4": 0.5, "pq": 0.1, "ipq": 0.1}  # Fan et al.: 0.5 for integers, 0.05 to 0.2 for PQ


@dataclass(frozen=True)
class Task:
    """A model, its data, how long it trains and is finetuned (iPQ only), and the test metric that counts."""

    name: str
    model: Callable[[], pl.LightningModule]
    data: Callable[[], pl.LightningDataModule]
    epochs: int
    finetune: Finetune
    metric: str
    title: str


TASKS = {
    "digits": Task("digits", DigitsClassifier, DigitsData, 14, Finetune(4, lr=3e-3), "test_accuracy", "accuracy"),
    "text": Task("text", TransformerLM, ReferenceText, 2, Finetune(1), "test_perplexity", "perplexity"),
}


@dataclass(frozen=True)
class Cell:
    """One way to make the model small. `rate` is the noise rate of its training, None for none."""

    scheme: str
    method: str
    rate: float | None = None

    @property
    def file(self) -> str:
        """Name of its packed file."""
        return f"{self.scheme}-{self.method}.safetensors"


CELLS = [Cell(FLOAT, FLOAT)] + [
    cell
    for scheme, rate in RATES.items()
    for cell in (Cell(scheme, POST), Cell(scheme, QAT, 1.0), Cell(scheme, NOISE, rate))
]
N_FITS = sum(cell.method != POST or cell.scheme == "ipq" for cell in CELLS)


def quiet() -> None:
    """Silence what Lightning says of every fit, under whichever of its names it says it."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")


class Ticks(pl.Callback):
    """Call a function after every training batch with the fraction of the fit that the batch was."""

    def __init__(self, tick: Callable[[float], None]) -> None:
        self.tick = tick

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.tick(1 / trainer.estimated_stepping_batches)


def run(
    task: Task, folder: Path, tick: Callable[[float], None] = lambda fraction: None
) -> Iterator[tuple[Cell, float]]:
    """Train and pack every cell of a task into `folder`; yield each cell with its seconds of training.

    Args:
        task: One of `TASKS`.
        folder: Existing folder for the packed files, `Cell.file`.
        tick: Called with the fraction of a fit that has just been done, `N_FITS` in sum.
    """
    quiet()
    pl.seed_everything(0, verbose=False)
    trained = task.model()
    for cell in CELLS:
        start = time.perf_counter()
        path = folder / cell.file
        if cell.scheme == FLOAT:
            fit(task, trained, [Ticks(tick)])
            save(trained, path)
        elif cell.rate is not None:
            pl.seed_everything(0, verbose=False)
            noise = QuantNoise(cell.scheme, rate=cell.rate)
            fit(task, task.model(), [Ticks(tick), noise, _quantize(task, cell, path)])
        elif cell.scheme == "ipq":
            fit(task, copy.deepcopy(trained), [Ticks(tick), _quantize(task, cell, path)], epochs=0)
        else:
            packed = quantize(copy.deepcopy(trained), cell.scheme)
            update_bn(_train_loader(task), packed)
            save(packed, path)
        yield cell, time.perf_counter() - start


def _quantize(task: Task, cell: Cell, path: Path) -> Quantize:
    return Quantize(cell.scheme, finetune=task.finetune, path=str(path.resolve()), evaluate=False)


def _train_loader(task: Task) -> DataLoader:
    data = task.data()
    data.setup("fit")
    return data.train_dataloader()


def fit(task: Task, model: pl.LightningModule, callbacks: list[pl.Callback], epochs: int | None = None) -> None:
    """Train a model of a task, for the task's epochs unless told otherwise."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=task.epochs if epochs is None else epochs,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=task.data())
