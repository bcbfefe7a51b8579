"""The second validation: it stands on the fit's own validation loop, which is not public."""

import importlib
from pathlib import Path

import pytest
import torch
from fits import ROOTS, Net, NoValidation, fit, losses, net, rows
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger

from lightning_qnoise.callbacks.evaluate import validate_again

BOOKS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class Again(Callback):
    """Doubles the weights at the end of the fit and validates once more."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.head.weight.mul_(2)
        self.before = {name: dict(getattr(trainer, name)) for name in BOOKS}
        pl_module.dropout.eval()  # a mode that the user has set
        self.metrics = validate_again(trainer)
        self.after = {name: dict(getattr(trainer, name)) for name in BOOKS}
        self.modes = (trainer.training, trainer.validating, pl_module.training, pl_module.dropout.training)
        self.state = (trainer.state.fn, trainer.global_step, trainer.current_epoch)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(
    "options", [{}, {"check_val_every_n_epoch": 9}, {"limit_val_batches": 2}, {"fast_dev_run": True}]
)
def test_it_measures_the_model_of_the_moment(root, options):
    model, again = net(root), Again()
    fit(model, [again], root, **options)
    n_batches = 1 if "fast_dev_run" in options else options.get("limit_val_batches", 4)
    loader = [batch for i, batch in enumerate(rows(32)) if i < n_batches]
    assert (again.metrics["val_loss"], again.metrics["val_acc"]) == pytest.approx(losses(model, loader), abs=1e-6)
    assert set(again.metrics) == {"val_loss", "val_acc"}


def test_nothing_else_changes():
    again, seen, logger = Again(), [], CSVLogger(".")
    watch = Callback()
    for hook in ("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"):
        setattr(watch, hook, lambda *_, hook=hook: seen.append(hook))
    made = fit(net(), [watch, again], logger=logger)
    assert seen.count("on_validation_start") == 2
    assert again.before == again.after
    assert again.before["callback_metrics"]["val_loss"] != again.metrics["val_loss"]
    assert again.modes == (True, False, True, False)
    assert again.state == ("fit", 16, 2)
    assert made.callbacks[:2] == [watch, again]
    assert made.loggers == [logger]
    assert str(again.metrics["val_loss"]) not in Path("lightning_logs/version_0/metrics.csv").read_text()


class Paints(Net):
    """Uses its logger in validation, as image models do."""

    def on_validation_epoch_end(self):
        self.logger.experiment.log_metrics({"extra": 1.0})
        self.logger.log_metrics({"extra": 2.0})


def test_a_module_that_uses_its_logger_in_validation():
    again = Again()
    fit(net(cls=Paints), [again], logger=CSVLogger("."))
    assert set(again.metrics) == {"val_loss", "val_acc"}


class TwoLoaders(Net):
    """Two validation sets."""

    def val_dataloader(self):
        return [rows(16), rows(32)]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


def test_several_validation_sets():
    model, again = net(cls=TwoLoaders), Again()
    fit(model, [again])
    for index, n in enumerate((16, 32)):
        loss, accuracy = losses(model, rows(n))
        assert again.metrics[f"val_loss/dataloader_idx_{index}"] == pytest.approx(loss, abs=1e-6)
        assert again.metrics[f"val_acc/dataloader_idx_{index}"] == pytest.approx(accuracy, abs=1e-6)


def test_no_validation_gives_no_metrics():
    again = Again()
    fit(net(cls=NoValidation), [again])
    assert again.metrics == {}


def test_an_error_in_it_leaves_the_trainer_as_it_was():
    class Fails(Again):
        def on_train_end(self, trainer, pl_module):
            pl_module.validation_step = lambda *_: 1 / 0
            with pytest.raises(ZeroDivisionError):
                validate_again(trainer)
            assert trainer.training
            assert self in trainer.callbacks
            self.done = True

    callback = Fails()
    fit(net(), [callback])
    assert callback.done


def test_only_the_progress_bar_sees_it():
    shown = []

    class Bar(TQDMProgressBar):
        def on_validation_start(self, *args):
            shown.append("bar")
            super().on_validation_start(*args)

    fit(net(), [Again(), Bar()], enable_progress_bar=True)
    assert len(shown) == 3


@pytest.mark.parametrize("root", ROOTS)
def test_what_it_stands_on_is_there_in_this_lightning(root):
    """The private and semi-private parts that it uses; when this fails, read evaluate.py against the new release."""
    module = importlib.import_module(root)
    made = module.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    loop = made.fit_loop.epoch_loop.val_loop
    assert callable(loop.run)
    assert loop is not made.validate_loop
    assert made.fit_loop.epoch_loop._batches_that_stepped == 0
    for name in BOOKS:
        assert getattr(made, name) is getattr(made, name) == {}
    assert made.enable_validation in (True, False)
