"""What our callbacks share inside a fit: refusals, one encoding for all ranks, logging after the last epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qnoise.callbacks.base import Callback, Trainer, class_names
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight, Scheme

_WRITE_AT_END = {"StochasticWeightAveraging", "WeightAveraging", "ModelPruning"}
_ROWS = "ModelParallelStrategy"  # FSDP2 cuts weights between rows
_SHARDED = {"FSDPStrategy", "XLAFSDPStrategy", "DeepSpeedStrategy", _ROWS}


def is_sharded_fit(trainer: Trainer) -> bool:
    """Whether the ranks of a fit hold different rows of the weights."""
    return _ROWS in class_names(trainer.strategy)


def check_fit(callback: Callback, trainer: Trainer, model: nn.Module, takes_rows: bool = False) -> None:
    """Raise a ValueError where a fit with this callback cannot work, naming the remedy.

    Args:
        callback: One of ours.
        trainer: The trainer.
        model: Its module.
        takes_rows: Whether the callback can do with weights that are sharded in rows (FSDP2).
    """
    name = type(callback).__name__
    twins = [c for c in trainer.callbacks if type(c) is type(callback) and getattr(c, "enabled", True)]
    if len(twins) > 1:
        raise ValueError(f"the trainer has {len(twins)} {name} callbacks; put their policies into one")
    if class_names(trainer.strategy) & _SHARDED and not (takes_rows and is_sharded_fit(trainer)):
        raise ValueError(
            f"{name} needs whole weights on every device, but {type(trainer.strategy).__name__} shards them; "
            f"use strategy='ddp'"
        )
    if next(packed_weights(model), None) is not None:
        raise ValueError(f"the model is already packed, so {name} cannot train it; call dequantize(model) first")


def check_later(callback: Callback, trainer: Trainer) -> None:
    """Raise a ValueError where a callback that writes weights at the end of the fit does so after ours."""
    for later in trainer.callbacks[trainer.callbacks.index(callback) + 1 :]:
        if class_names(later) & _WRITE_AT_END:
            name, ours = type(later).__name__, type(callback).__name__
            raise ValueError(f"{name} overwrites the weights at the end of the fit: list it before {ours}")


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
