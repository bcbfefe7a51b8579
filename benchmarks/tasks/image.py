"""Fashion-MNIST and a small residual network."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qnoise import PQ
from tasks.task import Batch, Batches, TaskModule

N_TRAIN, BATCH = 30_000, 128


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        changes = stride != 1 or n_in != n_out
        self.short = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if changes else None
        self.norm_short = nn.BatchNorm2d(n_out) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.short is None else self.norm_short(self.short(x))))


class ResNet(nn.Module):
    """A stem and three blocks: 309,162 parameters."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem, self.norm = nn.Conv2d(1, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a)
        self.stage1, self.stage2, self.stage3 = Block(a, a, 2), Block(a, b, 2), Block(b, c, 2)
        self.fc = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.fc(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


class ImageModule(TaskModule):
    """Classification; `test/metric` is the top-1 accuracy in percent."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("test/metric", 100 * right, batch_size=len(batch[1]))


class Image:
    """Data and settings. 2 epochs, 320 steps of finetuning."""

    name, metric, higher_is_better = "image", "top-1 %", True
    epochs, finetune_steps = 2, 320
    noise_rate, refresh = 0.1, 50

    def __init__(self, root: Path, work: Path) -> None:
        folder = root / "fashion-mnist"
        images, labels = _read(folder, "train")
        chosen = np.random.RandomState(0).permutation(len(labels))[:N_TRAIN]
        self.train, self.test = (images[chosen], labels[chosen]), _read(folder, "t10k")

    def module(self, width: int = 1) -> ImageModule:
        return ImageModule(ResNet((32 * width, 64 * width, 128 * width)), lr=3e-3, weight_decay=5e-4)

    def train_batches(self, seed: int) -> Batches:
        return Batches(self._epoch, N_TRAIN // BATCH, seed)

    def test_batches(self) -> Batches:
        x, y = self.test
        return Batches(lambda _: iter(zip(x.split(500), y.split(500), strict=True)), len(y) // 500, 0)

    def _epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        x, y = self.train
        for chosen in torch.randperm(len(y), generator=generator)[: len(y) // BATCH * BATCH].split(BATCH):
            flip = torch.rand(BATCH, generator=generator) < 0.5
            images = x[chosen]
            yield torch.where(flip[:, None, None, None], images.flip(3), images), y[chosen]

    @staticmethod
    def pq(size: str) -> dict[str, PQ | None]:
        """The reference's block sizes and centroids, a quarter of them for "S".

        Stage 1 has 4 centroids less than there: the reference leaves the counters of BatchNorm out of its bytes.
        """
        part = {"L": 1, "S": 4, "XS": 16}[size]
        return {
            "network.stem": None,
            "network.*.short": PQ(4, 64 // part),
            "network.stage1.*": PQ(9, 128 // part - 4),
            "network.fc": PQ(8, max(2, 32 // part)),
            "network.*.conv?": PQ(9, 256 // part),
        }


def _read(folder: Path, part: str) -> Batch:
    """Images float32 `[n, 1, 28, 28]`, standardised, and labels int64 `[n]`."""
    images, labels = _idx(folder / f"{part}-images-idx3-ubyte.gz"), _idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return (torch.tensor(images, dtype=torch.float32)[:, None] / 255 - 0.286) / 0.353, torch.tensor(labels).long()


def _idx(path: Path) -> np.ndarray:
    raw = gzip.open(path).read()
    n_dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dims)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims).reshape(shape)
