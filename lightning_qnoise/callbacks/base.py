"""One base for our callbacks that both `pytorch_lightning` and `lightning.pytorch` take for their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.imports import module_available
from torch import Tensor, nn

from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight, Scheme

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule
    from pytorch_lightning.loggers.logger import DummyLogger
else:
    _ROOTS = [root for root in ("pytorch_lightning", "lightning.pytorch") if module_available(root)]
    if not _ROOTS:
        raise ImportError("lightning_qnoise's callbacks need Lightning: pip install pytorch-lightning")
    Callback = type("Callback", tuple(import_module(root).Callback for root in _ROOTS), {})
    DummyLogger = import_module(f"{_ROOTS[0]}.loggers.logger").DummyLogger
    LightningModule = Any

Trainer = Any  # of either root; its attributes are set by connectors, which type checkers do not see

__all__ = [
    "Callback",
    "DummyLogger",
    "LightningModule",
    "Trainer",
    "check_fit",
    "class_names",
    "from_rank_zero",
    "log_after_fit",
]

_SHARDED = {"FSDPStrategy", "XLAFSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


def class_names(obj: object) -> set[str]:
    """Return the names of an object's class and its bases, equal for both roots of Lightning."""
    return {cls.__name__ for cls in type(obj).__mro__}


def check_fit(callback: Callback, trainer: Trainer, model: nn.Module) -> None:
    """Raise a ValueError where a fit with this callback cannot work, naming the remedy."""
    name = type(callback).__name__
    twins = [c for c in trainer.callbacks if type(c) is type(callback) and getattr(c, "enabled", True)]
    if len(twins) > 1:
        raise ValueError(f"the trainer has {len(twins)} {name} callbacks; put their policies into one")
    if class_names(trainer.strategy) & _SHARDED:
        raise ValueError(
            f"{name} needs whole weights on every device, but {type(trainer.strategy).__name__} shards them; "
            f"use strategy='ddp'"
        )
    if next(packed_weights(model), None) is not None:
        raise ValueError(f"the model is already packed, so {name} cannot train it; call dequantize(model) first")


def from_rank_zero(
    trainer: Trainer, encode: Callable[[], dict[str, PackedWeight]], like: Mapping[str, tuple[Scheme, Tensor]]
) -> dict[str, PackedWeight]:
    """Return what `encode` returns, or raise what it raises, on rank 0, on every rank.

    Args:
        trainer: A trainer inside a fit.
        encode: Called on rank 0 only.
        like: Scheme and weight of each of its results.
    """
    if trainer.world_size == 1:
        return encode()
    packed: dict[str, PackedWeight] = {}
    state: Any = None
    if trainer.is_global_zero:
        try:
            packed = encode()
            state = {name: {key: t.cpu() for key, t in weight.state_dict().items()} for name, weight in packed.items()}
        except ValueError as error:  # the other ranks must not wait for ever
            state = error
    state = trainer.strategy.broadcast(state, src=0)
    if isinstance(state, ValueError):
        raise state
    packed = packed or {name: scheme.empty(w.shape, w.dtype, w.device) for name, (scheme, w) in like.items()}
    for name, weight in packed.items():
        weight.load_state_dict(state[name])
    return packed


def log_after_fit(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log where `self.log` is no longer allowed: to the loggers and to `trainer.callback_metrics`."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in metrics.items()})
