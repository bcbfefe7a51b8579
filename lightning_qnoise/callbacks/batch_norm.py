"""Re-estimate BatchNorm statistics from within a fit: packed weights shift what the layers after them see."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qnoise.callbacks.base import LightningModule, Trainer
from lightning_qnoise.callbacks.batches import run_batches


def reestimate(trainer: Trainer, pl_module: LightningModule, n_batches: int) -> bool:
    """Replace the running statistics by their mean over training batches, run through `training_step` in train mode.

    Layers that the user keeps in eval mode keep their statistics. All ranks take those of rank 0. Without a Trainer,
    `torch.optim.swa_utils.update_bn(loader, model)` does the same.

    Args:
        trainer: A trainer inside a fit.
        pl_module: Its module.
        n_batches: Most batches to look at, within the fit's own limit; 0 leaves the statistics.

    Returns:
        Whether there was anything to estimate.
    """
    norms = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    if not norms or not n_batches:
        return False
    if not pl_module.automatic_optimization:
        rank_zero_info("Quantize: BatchNorm statistics are not re-estimated under manual optimization")
        return False
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean over the batches
    run_batches(trainer, pl_module, n_batches)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if trainer.world_size > 1:
            norm.load_state_dict(trainer.strategy.broadcast(dict(norm.named_buffers())), strict=False)
    return True
