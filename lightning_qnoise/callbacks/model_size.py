"""The size of the model in the logs: predicted when the fit starts, counted when it ends."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_qnoise.callbacks.base import Callback, LightningModule, Trainer
from lightning_qnoise.callbacks.fit import log_after_fit
from lightning_qnoise.callbacks.quantize import Quantize
from lightning_qnoise.size import size_table


class ModelSize(Callback):
    """Log the bytes of every layer: what packing will make of it, and what it has become.

    At the start of a fit the table of the predicted sizes is printed (by the policy of the trainer's `Quantize`); at
    the end `size/total_mb`, `size/compression` and `size/<layer>`, all in MB of 10^6 bytes, are logged and the table
    of the real sizes is printed. Both are the same function of the tensors that a file holds.

    Args:
        enabled: False makes the callback do nothing.

    Example:
        >>> ModelSize().enabled
        True
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the prediction."""
        if not self.enabled:
            return
        quantize = next((c for c in trainer.callbacks if isinstance(c, Quantize) and c.enabled), None)
        policy = quantize.find_policy(trainer) if quantize else None
        title = "Predicted size after packing" if policy is not None else "Size"
        rank_zero_info(f"{title}:\n{size_table(pl_module, policy)}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and print what the model has become."""
        if not self.enabled:
            return
        table = size_table(pl_module)
        layers = {f"size/{name}": entry.bytes / 1e6 for name, entry in table.layers().items()}
        log_after_fit(trainer, {**layers, **table.metrics})
        rank_zero_info(f"Size:\n{table}")
