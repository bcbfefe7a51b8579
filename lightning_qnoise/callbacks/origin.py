"""The float model from which quantization starts: the last or the best weights, and the copy that teaches."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_qnoise.callbacks.base import LightningModule, Trainer
from lightning_qnoise.callbacks.fit import is_sharded_fit


def folder(trainer: Trainer) -> Path:
    """Return where a fit writes its files. Must be called on every rank."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def check_start(trainer: Trainer, start: str) -> None:
    """Raise a ValueError where the best weights are asked for and no checkpoint callback knows a best."""
    if start == "best" and not any(getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks):
        raise ValueError("Quantize(start='best') needs a ModelCheckpoint with a monitor in the trainer")


def load_best(trainer: Trainer, pl_module: LightningModule) -> None:
    """Load the weights of the best checkpoint of the fit so far."""
    callbacks = [c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)]
    path = callbacks[0].best_model_path
    if not path:
        rank_zero_warn("Quantize: no best checkpoint has been saved yet; quantization starts from the last weights")
        return
    trainer.strategy.barrier("Quantize.load_best")
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)  # this fit wrote it
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
    rank_zero_info(f"Quantize: starts from the best weights, {path}")


def check_teacher(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise a ValueError where the float model cannot guide."""
    if not pl_module.automatic_optimization:
        raise ValueError("a teacher cannot guide manual optimization: pass Finetune(guidance=None)")
    if is_sharded_fit(trainer):
        raise ValueError("a sharded model cannot be copied as a teacher: pass Finetune(guidance=None)")


def make_teacher(trainer: Trainer, pl_module: LightningModule) -> tuple[LightningModule, str | None]:
    """Return a copy of the module, and the file that it was written to, for a fit that can be resumed.

    A checkpoint does not hold the teacher, so it lies beside: `float.ckpt` in the logger's folder.
    """
    teacher = deepcopy(pl_module)
    if trainer.fast_dev_run or not trainer.checkpoint_callbacks:
        return teacher, None
    path = folder(trainer) / "float.ckpt"
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": teacher.state_dict()}, path)
    return teacher, str(path.absolute())


def restore_teacher(pl_module: LightningModule, path: str | None) -> LightningModule:
    """Return a copy of the module with the weights of the file.

    Raises:
        FileNotFoundError: The file is gone.
    """
    if path is None or not Path(path).exists():
        raise FileNotFoundError(
            f"this checkpoint was saved in a finetuning stage, whose teacher was written to {path}, and that file is "
            f"gone; put it back, or resume from a checkpoint of the training before"
        )
    teacher = deepcopy(pl_module)
    teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return teacher
