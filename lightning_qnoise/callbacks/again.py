"""Run the fit loop once more inside `on_train_end`, with an optimizer and a length of its own.

The only place that drives Lightning's loops; what it touches there is not public, so tests pin it.
"""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_qnoise.callbacks.base import Trainer, class_names
from lightning_qnoise.callbacks.limits import Limits

_USERS_EPOCHS_ONLY = {
    "EarlyStopping",
    "Timer",
    "LearningRateFinder",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
}


def run_again(trainer: Trainer) -> None:
    """Run the fit loop to the trainer's limits. Callbacks see `on_train_start` and `on_train_end` once more."""
    trainer.should_stop = False
    trainer.training = True
    _forget_restart(trainer)
    trainer.fit_loop.run()


def start_new_epoch(trainer: Trainer) -> None:
    """Let a resumed run that was about to finish an epoch begin one. Called in `on_train_start`."""
    loop = trainer.fit_loop
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        progress.started = progress.processed = progress.completed = progress.ready
    _forget_restart(trainer)
    if not trainer.current_epoch:
        iter(loop._data_fetcher)  # in epoch 0 the trainer does not do that, and others may have looked at the data


def _forget_restart(trainer: Trainer) -> None:
    """A run that begins a stage does not go on in the middle of an epoch, even where the fit was resumed there."""
    loop = trainer.fit_loop
    loop._restarting = loop.epoch_loop.restarting = loop._resuming_from_checkpoint = False
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()


class UsersEpochs:
    """What only concerns the user's own epochs, set aside until `come_back`: limits, early stopping, averaging, ..."""

    def __init__(self, trainer: Trainer) -> None:
        self._limits = Limits.of(trainer)
        self._callbacks = trainer.callbacks
        trainer.callbacks = [c for c in self._callbacks if not class_names(c) & _USERS_EPOCHS_ONLY]
        left = [c for c in self._callbacks if c not in trainer.callbacks]
        if left:
            names = ", ".join(type(callback).__name__ for callback in left)
            rank_zero_info(f"Quantize: {names} ended with the training and takes no part in the finetuning")

    def come_back(self, trainer: Trainer) -> None:
        """Give the trainer its own again."""
        self._limits.apply(trainer)
        trainer.callbacks = self._callbacks


def forget_best(trainer: Trainer) -> None:
    """Let `ModelCheckpoint` choose the best and save the last anew: what it kept so far is another model."""
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "best_k_models"):
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = callback._last_checkpoint_saved = ""
            callback.best_model_score = callback.current_score = None
