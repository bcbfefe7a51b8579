"""How far a fit has come, as a fraction."""

from __future__ import annotations

import math

from lightning_qnoise.callbacks.base import Trainer


def is_bounded(trainer: Trainer) -> bool:
    """Whether the length of the fit is known in epochs or steps."""
    return trainer.max_steps > 0 or (trainer.max_epochs or -1) > 0


def progress(trainer: Trainer, batch_idx: int) -> float:
    """Return the fraction of the fit that lies behind, in [0, 1]: of `max_epochs` or `max_steps`, the nearer."""
    fractions = [0.0]
    if trainer.max_steps > 0:
        fractions.append(trainer.global_step / trainer.max_steps)
    if (trainer.max_epochs or -1) > 0:
        batches = trainer.num_training_batches
        within = batch_idx / batches if batches and math.isfinite(batches) else 0.0
        fractions.append((trainer.current_epoch + within) / trainer.max_epochs)
    return min(max(fractions), 1.0)
