"""Re-estimate BatchNorm statistics from within a fit: packed weights shift what the layers after them see."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qnoise.callbacks.base import LightningModule, Trainer


def reestimate(trainer: Trainer, pl_module: LightningModule, n_batches: int) -> None:
    """Replace the running statistics by their mean over training batches, run through `training_step` in train mode.

    Layers that the user keeps in eval mode keep their statistics. All ranks take those of rank 0. Without a Trainer,
    `torch.optim.swa_utils.update_bn(loader, model)` does the same.

    Args:
        trainer: A trainer inside a fit.
        pl_module: Its module.
        n_batches: Most batches to look at, within the fit's own limit; 0 leaves the statistics.
    """
    norms = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    if not norms or not n_batches:
        return
    if not pl_module.automatic_optimization:
        rank_zero_info("Quantize: BatchNorm statistics are not re-estimated under manual optimization")
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean over the batches
    epoch_loop = trainer.fit_loop.epoch_loop
    limit = int(min(n_batches, trainer.num_training_batches))
    with torch.no_grad(), _unlogged(pl_module), trainer.precision_plugin.train_step_context():
        for index, (batch, _, dataloader_idx) in enumerate(islice(trainer.fit_loop._combined_loader, limit)):
            moved = trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
            pl_module.training_step(**epoch_loop._build_kwargs(OrderedDict(), moved, index))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if trainer.world_size > 1:
            norm.load_state_dict(trainer.strategy.broadcast(dict(norm.named_buffers())), strict=False)


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
