"""The learning-rate schedule of both demo models."""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig


def warmup_cosine(optimizer: torch.optim.Optimizer, trainer: pl.Trainer, warmup: float) -> OptimizerLRSchedulerConfig:
    """Return what `configure_optimizers` returns: a linear warm-up, then a cosine to zero over the steps of the fit.

    Args:
        optimizer: Its learning rates are the peaks.
        trainer: A trainer inside a fit, which knows the number of steps.
        warmup: Fraction of the steps that the warm-up takes.
    """
    n_steps = max(1, int(trainer.estimated_stepping_batches))

    def factor(step: int) -> float:
        done = min(1.0, step / n_steps)
        return min(1.0, (step + 1) / (warmup * n_steps)) * (0.5 + 0.5 * math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
