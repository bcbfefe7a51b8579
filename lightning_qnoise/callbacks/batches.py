"""Run training batches through a module from within a fit, unlogged and without gradients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch

from lightning_qnoise.callbacks.base import LightningModule, Trainer


def run_batches(trainer: Trainer, pl_module: LightningModule, n_batches: int) -> None:
    """Call `training_step` on training batches, in the mode that the module is in.

    Args:
        trainer: A trainer inside a fit.
        pl_module: Its module, under automatic optimization.
        n_batches: Most batches, within the fit's own limit.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    limit = int(min(n_batches, trainer.num_training_batches))
    with torch.no_grad(), _unlogged(pl_module), trainer.precision_plugin.train_step_context():
        for index, (batch, _, dataloader_idx) in enumerate(islice(trainer.fit_loop._combined_loader, limit)):
            moved = trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
            arguments = epoch_loop._build_kwargs(OrderedDict(), moved, index)
            pl_module.training_step(*arguments.values())  # by position, as Lightning does


@contextmanager
def _unlogged(pl_module: LightningModule) -> Iterator[None]:
    """`self.log` is not allowed where this runs."""
    names = ("log", "log_dict")
    for name in names:
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            del pl_module.__dict__[name]
