"""Where a run of the fit loop ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_qnoise.callbacks.base import Trainer


@dataclass(frozen=True)
class Limits:
    """Where a run of the fit loop ends, counted from the first step of the fit; -1 is no limit."""

    epoch: int
    step: int

    @classmethod
    def of(cls, trainer: Trainer, state: Mapping[str, Any] | None = None) -> Limits:
        """Those of a stage, from its state in a checkpoint, or else those of the trainer."""
        if state and state["stage"]:
            return cls(*state["limits"])
        epochs = trainer.fit_loop.max_epochs
        return cls(-1 if epochs is None else epochs, trainer.fit_loop.epoch_loop.max_steps)

    @classmethod
    def after(cls, trainer: Trainer, epochs: int, steps: int | None) -> Limits:
        """Those of a run that starts now and lasts so many epochs, or steps where given."""
        if steps is not None:
            return cls(-1, trainer.global_step + steps)
        return cls(trainer.fit_loop.epoch_progress.current.processed + epochs, -1)

    def apply(self, trainer: Trainer) -> None:
        """Set the trainer's."""
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = self.epoch, self.step

    def reached(self, epoch: int, step: int) -> bool:
        """Whether a fit with so many finished epochs and steps has come to this end."""
        return 0 <= self.epoch <= epoch or 0 <= self.step <= step

    def reached_in(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a fit that resumes from the checkpoint has nothing left to do."""
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        return self.reached(epochs, checkpoint["global_step"])


def n_steps(trainer: Trainer, epochs: int) -> int:
    """Return the optimizer steps of so many epochs.

    Raises:
        ValueError: The training data have no length.
    """
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        raise ValueError("the training data have no length, so finetuning cannot be counted in epochs: give its steps")
    return epochs * math.ceil(batches / trainer.accumulate_grad_batches)
