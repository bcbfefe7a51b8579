"""Fresh optimizers within a fit: at their peak rates, under a schedule of ours, with codebooks beside weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_qnoise.callbacks.base import LightningModule, LRSchedulerConfig, Trainer


def set_optimizers(
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: Callable[[Iterable], Optimizer] | None,
    lr: float | None,
) -> None:
    """Give the trainer fresh optimizers; under automatic optimization at their peak rates and without a schedule.

    Args:
        trainer: A trainer inside a fit.
        pl_module: Its module.
        optimizer: Makes one from the trainable parameters; None calls `configure_optimizers` anew.
        lr: Peak learning rate of all groups; None keeps that of each group (before its own schedule, which is dropped).
    """
    strategy = trainer.strategy
    if optimizer is None:
        strategy.setup_optimizers(trainer)
    else:
        strategy.optimizers = [optimizer([p for p in pl_module.parameters() if p.requires_grad])]
    if pl_module.automatic_optimization:
        strategy.lr_scheduler_configs = []
        for made in strategy.optimizers:
            for group in made.param_groups:
                group["lr"] = group["initial_lr"] = _peak(group) if lr is None else lr


def check_optimizers(optimizers: Iterable[Any], reassign: bool) -> None:
    """Raise a ValueError for an optimizer that cannot move latent weights."""
    for optimizer in optimizers:
        if reassign and type(optimizer).__name__ == "LBFGS":
            raise ValueError("LBFGS evaluates the model several times a step; pass Finetune(reassign=False)")


def set_schedule(trainer: Trainer, factor: Callable[[int], float]) -> None:
    """Let the learning rates of the fresh optimizers follow `factor`, a function of the step."""
    trainer.strategy.lr_scheduler_configs = [
        LRSchedulerConfig(LambdaLR(made, factor), interval="step") for made in trainer.strategy.optimizers
    ]


def add_codebooks(
    trainer: Trainer, codebooks: Iterable[tuple[Tensor, Tensor]], rate: float, has_schedule: bool
) -> None:
    """Let codebooks be trained by the optimizer that trains their weight, if any does.

    Args:
        trainer: A trainer with fresh optimizers.
        codebooks: Pairs of a Parameter and its codebook.
        rate: The codebooks' learning rate over that of the Parameter's group.
        has_schedule: Whether a schedule of the user's own goes on, which does not bear new groups: the codebooks join
            that of their weight then, and `rate` is not used.
    """
    for optimizer in trainer.strategy.optimizers:
        for group in list(optimizer.param_groups):
            members = {id(parameter) for parameter in group["params"]}
            found = [codebook for parameter, codebook in codebooks if id(parameter) in members]
            if has_schedule:
                group["params"].extend(found)
            elif found:
                lr = rate * group["lr"]
                names: dict[str, Any] = {"name": f"{group['name']}/codebooks"} if "name" in group else {}
                if "param_names" in group:
                    names["param_names"] = [f"codebook{index}" for index in range(len(found))]
                optimizer.add_param_group({**group, **names, "params": found, "lr": lr, "initial_lr": lr})


def _peak(group: dict[str, Any]) -> float:
    """The learning rate of a group before a schedule took hold of it."""
    return group.get("max_lr", group.get("initial_lr", group["lr"]))
