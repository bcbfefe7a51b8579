"""Run the validation of a running fit once more, unseen by loggers, checkpoints and early stopping."""

from __future__ import annotations

from lightning_qnoise.callbacks.base import DummyLogger, Trainer, class_names

_SHOWN = {"ProgressBar"}


def validate_again(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of one validation run from within a fit hook (empty where the fit has no validation).

    Only progress bars see the run. Uses the fit's own validation loop, which `trainer.validate` would replace; it is
    not public, so tests pin it.
    """
    if not trainer.enable_validation:
        return {}
    callbacks, loggers = trainer.callbacks, trainer.loggers
    books = [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]
    known = [dict(book) for book in books]
    trainer.callbacks = [callback for callback in callbacks if class_names(callback) & _SHOWN]
    trainer.loggers = [DummyLogger() for _ in loggers]  # a module may well call self.logger.experiment
    trainer.validating = True
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # else a resumed fit takes the place in the validation data from its checkpoint
    try:
        outputs = loop.run()
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers
        trainer.training = True
        for book, entries in zip(books, known, strict=True):
            book.clear()
            book.update(entries)
    return {name: float(value) for output in outputs for name, value in output.items()}
