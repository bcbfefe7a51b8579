"""What packing learns from the fit's own training data: ranges of static activations, second moments of inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_qnoise.calibrate import collecting, in_eval, is_static, observing
from lightning_qnoise.callbacks.base import LightningModule, Trainer
from lightning_qnoise.callbacks.batch_norm import reestimate
from lightning_qnoise.callbacks.batches import run_batches
from lightning_qnoise.callbacks.evaluate import validate_again
from lightning_qnoise.callbacks.fit import is_sharded_fit
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import Scheme


def check_data(
    trainer: Trainer, pl_module: LightningModule, schemes: Mapping[str, Scheme], staged: bool, n_batches: int
) -> None:
    """Raise a ValueError where schemes need data that the end of the fit cannot give them.

    Args:
        trainer: A trainer at the start of a fit.
        pl_module: Its module.
        schemes: Weight name -> scheme.
        staged: Whether the weights are finetuned in stages.
        n_batches: How many batches there will be.
    """
    moment = [name for name, scheme in schemes.items() if scheme.needs_inputs]
    needy = moment + [name for name, scheme in schemes.items() if is_static(scheme)]
    if moment and staged:
        raise ValueError(f"layer {moment[0]!r}: rounding='gptq' is for packing in one shot; stages finetune instead")
    if needy and not n_batches:
        raise ValueError(f"layer {needy[0]!r} needs data to be quantized: Quantize(calibration=8)")
    if needy and is_sharded_fit(trainer):
        raise ValueError(f"layer {needy[0]!r} needs calibration, which a sharded model cannot have; use strategy='ddp'")
    learned = [name for name, scheme in schemes.items() if getattr(scheme, "range", None) == "lsq"]
    if learned and is_sharded_fit(trainer):
        raise ValueError(f"layer {learned[0]!r}: scales of a sharded model cannot be learned; use range='mse'")
    if needy and not pl_module.automatic_optimization and not trainer.enable_validation:
        raise ValueError(f"layer {needy[0]!r} needs data: under manual optimization, those of a validation_step")


def input_moments(
    trainer: Trainer, pl_module: LightningModule, schemes: Mapping[str, Scheme], n_batches: int
) -> dict[str, Tensor]:
    """Return the second moments of inputs that schemes need, weight name -> `[cols, cols]`."""
    with collecting(pl_module, schemes) as moments:
        if moments:
            _show(trainer, pl_module, n_batches)
    return {name: moment.mean(name) for name, moment in moments.items()}


def adjust(trainer: Trainer, pl_module: LightningModule, batch_norm: int, calibration: int) -> None:
    """Fit ranges and BatchNorm statistics of a packed module to each other: ranges, statistics, ranges again.

    Args:
        trainer: A trainer inside a fit.
        pl_module: Its module.
        batch_norm: Training batches for the statistics.
        calibration: Training batches for the ranges.
    """
    _calibrate(trainer, pl_module, calibration)
    if reestimate(trainer, pl_module, batch_norm):
        _calibrate(trainer, pl_module, calibration)


def _calibrate(trainer: Trainer, pl_module: LightningModule, n_batches: int) -> None:
    """Fix the ranges of static activations; all ranks take those of rank 0."""
    with observing(pl_module) as observed:
        if observed:
            _show(trainer, pl_module, n_batches)
    if observed and trainer.world_size > 1:
        set_ranges(pl_module, trainer.strategy.broadcast(get_ranges(pl_module), src=0))


def get_ranges(pl_module: LightningModule) -> dict[str, dict[str, Tensor]]:
    """Return the ranges of static activations, weight name -> state."""
    return {name: weight.input_state() for name, weight in packed_weights(pl_module) if is_static(weight.scheme)}


def set_ranges(pl_module: LightningModule, ranges: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Take what `get_ranges` returned."""
    for name, weight in packed_weights(pl_module):
        if name in ranges:
            weight.load_state_dict(ranges[name], strict=False)


def _show(trainer: Trainer, pl_module: LightningModule, n_batches: int) -> None:
    """Let the module see data in eval mode: training batches, or under manual optimization a validation run."""
    if not pl_module.automatic_optimization:
        validate_again(trainer)
        return
    with in_eval(pl_module), torch.no_grad():
        run_batches(trainer, pl_module, n_batches)
