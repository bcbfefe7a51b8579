"""What the two tasks share: batches made from tensors, and a module with the optimizer and schedule of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

Batch = tuple[Tensor, Tensor]


class Batches(IterableDataset):
    """Ready-made batches of one epoch; every pass draws anew from one generator."""

    def __init__(self, draw: Callable[[torch.Generator], Iterator[Batch]], n_batches: int, seed: int) -> None:
        self.draw, self.n_batches = draw, n_batches
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        return self.draw(self.generator)

    def __len__(self) -> int:
        return self.n_batches

    def loader(self) -> DataLoader:
        """As a loader that passes the batches on."""
        return DataLoader(self, batch_size=None)


class TaskModule(pl.LightningModule):
    """A network trained by AdamW (matrices decayed, vectors not), warm-up over a tenth, then a cosine to zero."""

    def __init__(self, network: nn.Module, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.network = network
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        steps = max(1, int(self.trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
