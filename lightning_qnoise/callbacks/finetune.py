"""How a model is finetuned while it is quantized, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from lightning_qnoise.distill import Guidance
from lightning_qnoise.schedules import RateSchedule, WarmupCosine

_SCHEDULE, _GUIDANCE = WarmupCosine(), Guidance()


@dataclass(frozen=True)
class Finetune:
    """The finetuning of `Quantize(stages=...)`. Every stage is a run of its own, with a fresh optimizer and schedule.

    Args:
        epochs: Epochs of every stage, or one number a stage.
        steps: Optimizer steps of every stage instead of epochs, or one number a stage.
        lr: Peak learning rate; None takes that of the user's optimizer, group by group.
        optimizer: Makes an optimizer from parameters; None calls `configure_optimizers` anew.
        schedule: What the peak rate is multiplied by, a function of the stage's progress in [0, 1]. The user's own
            schedule has ended with the training. Under manual optimization rates are the user's business.
        reassign: Whether blocks may change their codeword (straight-through, every block behind its codeword moves on
            its own). False keeps the codes of the clustering and trains the codewords alone (Stock et al. 2020).
        codebook_rate: The codewords' learning rate over that of their weight's group; only with `reassign`.
        dropout: Whether dropout layers drop during the stages. A quantized model fits less than the float one did, so
            that finetuning it without dropout is better on every task measured.
        guidance: How the float model guides as a teacher; None trains on the task's loss alone.

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> Finetune(steps=[80, 80, 160]).steps_of(2)
        160
    """

    epochs: int | Sequence[int] = 1
    steps: int | Sequence[int] | None = None
    lr: float | None = None
    optimizer: Callable[[Iterable], Optimizer] | None = None
    schedule: RateSchedule | Callable[[float], float] = _SCHEDULE
    reassign: bool = True
    codebook_rate: float = 1 / 3
    dropout: bool = False
    guidance: Guidance | None = _GUIDANCE

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            numbers = value if isinstance(value, Sequence) else [value]
            is_default = name == "steps" and value is None
            if not is_default and (not numbers or any(not isinstance(n, int) or n < 1 for n in numbers)):
                raise ValueError(f"{name} must be a number >= 1, or one a stage, got {value!r}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not self.codebook_rate > 0:
            raise ValueError(f"codebook_rate must be positive, got {self.codebook_rate}")

    def check_stages(self, n_stages: int) -> None:
        """Raise a ValueError unless lists have one number a stage."""
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != n_stages:
                raise ValueError(f"Finetune({name}={list(value)}) has {len(value)} numbers for {n_stages} stages")

    def epochs_of(self, index: int) -> int:
        """Return the epochs of a stage, counted from 0."""
        return self.epochs if isinstance(self.epochs, int) else self.epochs[index]

    def steps_of(self, index: int) -> int | None:
        """Return the steps of a stage, counted from 0; None where it is measured in epochs."""
        return self.steps[index] if isinstance(self.steps, Sequence) else self.steps
