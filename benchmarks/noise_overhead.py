"""What Quant-Noise costs: the time of a training step with the callback over that without, in alternating fits.

`python benchmarks/noise_overhead.py` prints a row per model and noise and writes `results/noise_overhead.csv` here.
A step is everything between two `on_train_batch_start`: masks, forward, backward, optimizer, logging. The clustering
of the codebooks, once an epoch, is timed on its own.
"""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_qnoise import QuantNoise
from lightning_qnoise.demos import ReferenceText, TransformerLM

BATCH = 32
NOISES = {
    "PQ exact": lambda: QuantNoise("pq", rate=0.1),
    "PQ zero": lambda: QuantNoise("pq", rate=0.1, kind="zero"),
    "int8": lambda: QuantNoise("int8", rate=0.1),
}


class Layer(pl.LightningModule):
    """One layer trained on noise with a squared loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.layer(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class ResNetBlock(nn.Module):
    """The basic block of He et al. (2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Repeat(Dataset):
    """The same random batch, over and over."""

    def __init__(self, batch: Tensor | tuple[Tensor, Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        return self.batch


MODELS: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], Tensor | tuple[Tensor, Tensor]]]] = {
    "shipped LM": (TransformerLM, lambda: tuple(torch.randint(0, 1024, (2, BATCH, 64)))),
    "Transformer layer 512": (
        lambda: Layer(nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)),
        lambda: torch.randn(BATCH, 64, 512),
    ),
    "ResNet block 128": (lambda: Layer(ResNetBlock(128)), lambda: torch.randn(BATCH, 128, 28, 28)),
}


class Stopwatch(pl.Callback):
    """Seconds from one batch start to the next, and those of the first epoch start (where codebooks are clustered)."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.starts.append(time.perf_counter())

    @property
    def step(self) -> float:
        return statistics.median(b - a for a, b in zip(self.starts[1:-1], self.starts[2:], strict=True))


def time_fit(model: str, callbacks: list[pl.Callback], steps: int) -> float:
    """Return the median seconds of a step."""
    build, batch = MODELS[model]
    pl.seed_everything(0, verbose=False)
    watch = Stopwatch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[watch, *callbacks],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(build(), DataLoader(Repeat(batch(), steps), batch_size=None))
    return watch.step


def time_refresh(model: str) -> float:
    """Return the seconds of one warm refresh of all codebooks."""
    callback = QuantNoise("pq", rate=0.1)
    module = MODELS[model][0]()
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    callback.on_fit_start(trainer, module)
    callback._refresh(trainer)
    start = time.perf_counter()
    callback._refresh(trainer)
    return time.perf_counter() - start


def epoch_share(refresh: float, step: float) -> float:
    """Return the seconds of a refresh over those of an epoch of the shipped text at this batch size."""
    data = ReferenceText(batch_size=BATCH)
    data.setup("fit")
    return refresh / (step * len(data.train_dataloader()))


def measure(model: str, noise: str, rounds: int, steps: int) -> dict[str, object]:
    """Return one row: median step times and the median over rounds of their ratio."""
    pairs = [(time_fit(model, [], steps), time_fit(model, [NOISES[noise]()], steps)) for _ in range(rounds)]
    refresh = time_refresh(model) if noise == "PQ exact" else None
    plain = statistics.median(a for a, _ in pairs)
    return {
        "model": model,
        "noise": noise,
        "batch": BATCH,
        "plain_ms": round(1e3 * plain, 2),
        "noisy_ms": round(1e3 * statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "refresh_ms": round(1e3 * refresh, 1) if refresh else "",
        "refresh_per_epoch": round(epoch_share(refresh, plain), 4) if refresh and model == "shipped LM" else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "noise_overhead.csv")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    for model in arguments.models:
        for noise in NOISES:
            rows.append(measure(model, noise, arguments.rounds, arguments.steps))
            print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.exists():  # the models that were not measured now keep their rows
        with open(arguments.out, newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["model"] not in arguments.models]
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
