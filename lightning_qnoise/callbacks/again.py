"""Run the fit loop once more inside `on_train_end`, with an optimizer and a length of its own.

The only place that drives Lightning's loops; what it touches there is not public, so tests pin it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_qnoise.callbacks.base import LightningModule, LRSchedulerConfig, Trainer, class_names

_USERS_EPOCHS_ONLY = {
    "EarlyStopping",
    "Timer",
    "LearningRateFinder",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
}


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


def set_optimizers(
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: Callable[[Iterable], Optimizer] | None,
    lr: float | None,
) -> None:
    """Give the trainer fresh optimizers; under automatic optimization at their peak rates and without a schedule.

    Args:
        trainer: A trainer inside a fit.
        pl_module: Its module.
        optimizer: Makes one from the trainable parameters; None calls `configure_optimizers` anew.
        lr: Peak learning rate of all groups; None keeps that of each group (before its own schedule, which is dropped).
    """
    strategy = trainer.strategy
    if optimizer is None:
        strategy.setup_optimizers(trainer)
    else:
        strategy.optimizers = [optimizer([p for p in pl_module.parameters() if p.requires_grad])]
    if pl_module.automatic_optimization:
        strategy.lr_scheduler_configs = []
        for made in strategy.optimizers:
            for group in made.param_groups:
                group["lr"] = group["initial_lr"] = _peak(group) if lr is None else lr


def set_schedule(trainer: Trainer, factor: Callable[[int], float]) -> None:
    """Let the learning rates of the fresh optimizers follow `factor`, a function of the step."""
    trainer.strategy.lr_scheduler_configs = [
        LRSchedulerConfig(LambdaLR(made, factor), interval="step") for made in trainer.strategy.optimizers
    ]


def add_codebooks(
    trainer: Trainer, codebooks: Iterable[tuple[Tensor, Tensor]], rate: float, has_schedule: bool
) -> None:
    """Let codebooks be trained by the optimizer that trains their weight, if any does.

    Args:
        trainer: A trainer with fresh optimizers.
        codebooks: Pairs of a Parameter and its codebook.
        rate: The codebooks' learning rate over that of the Parameter's group.
        has_schedule: Whether a schedule of the user's own goes on, which does not bear new groups: the codebooks join
            that of their weight then, and `rate` is not used.
    """
    for optimizer in trainer.strategy.optimizers:
        for group in list(optimizer.param_groups):
            members = {id(parameter) for parameter in group["params"]}
            found = [codebook for parameter, codebook in codebooks if id(parameter) in members]
            if has_schedule:
                group["params"].extend(found)
            elif found:
                rates = {"lr": rate * group["lr"], "initial_lr": rate * _peak(group)}
                optimizer.add_param_group({**group, "params": found, **rates})


def _peak(group: dict[str, Any]) -> float:
    """The learning rate of a group before a schedule took hold of it."""
    return group.get("max_lr", group.get("initial_lr", group["lr"]))


def run_again(trainer: Trainer) -> None:
    """Run the fit loop to the trainer's limits. Callbacks see `on_train_start` and `on_train_end` once more."""
    trainer.should_stop = False
    trainer.training = True
    trainer.fit_loop.run()


def start_new_epoch(trainer: Trainer) -> None:
    """Let a resumed run that was about to finish an epoch begin one. Called in `on_train_start`."""
    loop = trainer.fit_loop
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        progress.started = progress.processed = progress.completed = progress.ready
    loop._restarting = loop.epoch_loop.restarting = False
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()


def without_users_epochs(callbacks: Iterable[Any]) -> list[Any]:
    """Return the callbacks without those that only concern the user's own epochs (early stopping, averaging, ...)."""
    kept = [callback for callback in callbacks if not class_names(callback) & _USERS_EPOCHS_ONLY]
    left = [type(callback).__name__ for callback in callbacks if callback not in kept]
    if left:
        rank_zero_info(f"Quantize: {', '.join(left)} ended with the training and takes no part in the finetuning")
    return kept


def forget_best(trainer: Trainer) -> None:
    """Let `ModelCheckpoint` choose the best anew: what it kept so far is another model."""
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "best_k_models"):
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = callback.current_score = None
