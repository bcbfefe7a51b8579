"""Run the validation of a running fit once more, unseen by loggers, checkpoints and early stopping."""

from __future__ import annotations

from lightning_qnoise.callbacks.base import Trainer, class_names

_SHOWN = {"ProgressBar"}


def validate_again(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of one validation run from within a fit hook (empty where the fit has no validation).

    Only progress bars see the run. Uses the fit's own validation loop, which `trainer.validate` would replace; it is
    not public, so tests pin it.
    """
    if not trainer.enable_validation:
        return {}
    callbacks, loggers = trainer.callbacks, trainer.loggers
    known = dict(trainer.callback_metrics)
    trainer.callbacks = [callback for callback in callbacks if class_names(callback) & _SHOWN]
    trainer.loggers = []
    trainer.validating = True
    try:
        outputs = trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers
        trainer.training = True
        trainer.callback_metrics.clear()
        trainer.callback_metrics.update(known)
    return {name: float(value) for output in outputs for name, value in output.items()}
