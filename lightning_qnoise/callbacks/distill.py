"""When a teacher guides a fit: another model, a checkpoint, the student's moving average, or its best so far."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_qnoise.callbacks.base import Callback, LightningModule, Trainer
from lightning_qnoise.callbacks.fit import check_fit
from lightning_qnoise.callbacks.quantize import Quantize
from lightning_qnoise.distill import Guidance, Guide, MovingAverage
from lightning_qnoise.distill.average import check_decay


class Distill(Callback):
    """Train with a teacher (Hinton et al. 2015): its outputs, and features if wanted, enter the loss of every step.

    The loss that `training_step` returns becomes `(1 - alpha) * loss + alpha * part`; the teacher's part is logged as
    `distill/loss`. The teacher is frozen, in eval mode, on the student's device, and no part of the module: neither its
    state dict, nor the optimizer, nor a checkpoint's `state_dict` has it. Validation and test are not touched. In the
    stages of a `Quantize` in the same trainer its own guidance takes over; with `Finetune(guidance=None)` this teacher
    stays. A trainer takes one `Distill`: for several teachers, pass a module that calls them.

    Args:
        teacher: A module of any architecture, which is called with what the student's target is called with and is
            frozen and moved in place (it is copied where `guidance.dtype` is given). Or the path of a Lightning
            checkpoint of the student's own class and sizes. Or `"ema"`, the exponential moving average of the student,
            updated after every step of the optimizer (Tarvainen & Valpola 2017) and checkpointed. Or `"best"`, the
            student's best weights so far by the trainer's `ModelCheckpoint`; there is no guidance before the first.
        guidance: How the teacher guides: weight, temperature or loss, target, dtype, features.
        decay: Of `"ema"`, in [0, 1); the average is the plain mean of the first weights until the decay takes over.
        enabled: False makes the callback do nothing.

    Raises:
        ValueError: An argument is out of range or the teacher's file does not exist. At the start of a fit: manual
            optimization, a sharded strategy, a packed student, `"best"` without a monitored `ModelCheckpoint`, a target
            or feature that does not exist, a teacher that shares weights with the student. In the first step: it is
            not clear what to compare, or shapes differ.

    Example:
        >>> Distill("ema", Guidance(alpha=0.3, features={"encoder": "encoder"}), decay=0.99).teacher
        'ema'
    """

    def __init__(
        self,
        teacher: nn.Module | str | Path,
        guidance: Guidance = Guidance(),  # noqa: B008 - frozen
        decay: float = 0.999,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module) and teacher not in ("ema", "best") and not Path(teacher).is_file():
            raise ValueError(
                f"teacher must be a module, 'ema', 'best' or the path of a checkpoint, and there is no file "
                f"{str(teacher)!r}"
            )
        check_decay(decay)
        self.teacher = teacher
        self.guidance = guidance
        self.decay = decay
        self.enabled = enabled
        self._model: nn.Module | None = None  # the teacher of this fit
        self._average: MovingAverage | None = None
        self._best: tuple[str, Tensor | None] = ("", None)  # path and score of what the teacher holds
        self._guide: Guide | None = None
        self._is_new_run = False
        self._has_stepped = False
        self._handles: list[RemovableHandle] = []
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit" or not self.enabled:
            return
        self._restored = {}
        check_fit(self, trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise ValueError(
                "a teacher cannot guide manual optimization: call Guidance.compare in training_step instead"
            )
        if self.teacher == "best":
            _monitored(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the teacher, after `configure_model` and on the student's device."""
        self._dismiss(pl_module)
        if not self.enabled:
            return
        self._best = ("", None)
        dtype = getattr(torch, self.guidance.dtype) if self.guidance.dtype else None
        if self.teacher == "ema":
            self._average = MovingAverage(pl_module, self.decay, dtype)
            self._model = self._average.model
            if self._restored:
                self._average.load_state_dict(self._restored)
        elif isinstance(self.teacher, nn.Module):
            _check_separate(pl_module, self.teacher)
            self._model = deepcopy(self.teacher) if dtype else self.teacher
        else:
            self._model = deepcopy(pl_module)
            if self.teacher != "best":
                self._load(trainer, pl_module, str(self.teacher))
        self._model.to(device=pl_module.device, dtype=dtype)
        self._make_guide(pl_module).detach()  # names are checked now
        kind = type(self.teacher).__name__ if isinstance(self.teacher, nn.Module) else self.teacher
        rank_zero_info(f"Distill: the teacher is {kind}, with weight {self.guidance.alpha}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run of the fit loop begins, perhaps one of several in a fit."""
        self._is_new_run = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to guide, in the first batch of a run: other callbacks have made their own changes by then."""
        if self._model is None:
            return
        if self._is_new_run:
            self._is_new_run = False
            self._stop_guiding()
            if not _is_replaced(trainer):
                self._start_guiding(trainer, pl_module)
        if self._guide is not None and self.teacher == "best":
            self._find_best(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the average follow where the optimizer has made a step, and log."""
        if self._average is not None and self._has_stepped:
            self._average.update(pl_module)
        self._has_stepped = False
        if self._guide is not None and self._guide.last is not None:
            pl_module.log("distill/loss", self._guide.last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop guiding; the teacher is kept for another run."""
        self._stop_guiding()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its training step back; no other hook runs after an exception."""
        self._dismiss(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its training step back."""
        self._dismiss(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving average, from which a resumed fit goes on bit-equally; other teachers are rebuilt."""
        return self._restored if self._average is None else self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        if self._average is None:
            self._restored = state_dict
        elif state_dict:  # a learning rate finder puts the state back in the middle of a fit
            self._average.load_state_dict(state_dict)

    def _make_guide(self, pl_module: LightningModule) -> Guide:
        assert self._model is not None
        return Guide(pl_module, self._model, self.guidance, whole=not isinstance(self.teacher, nn.Module))

    def _start_guiding(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._guide = self._make_guide(pl_module)
        for optimizer in trainer.optimizers if self._average is not None else []:
            self._handles.append(optimizer.register_step_post_hook(self._note_step))

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True

    def _stop_guiding(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._guide is not None:
            self._guide.detach()
            self._guide = None

    def _dismiss(self, pl_module: LightningModule) -> None:
        self._stop_guiding()
        self._restored = self.state_dict()  # for a checkpoint that is saved after the fit
        self._model = self._average = None

    def _find_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best weights where there are new ones, and guide only where there are some."""
        assert self._guide is not None
        callback = _monitored(trainer)
        path, score = callback.best_model_path, callback.best_model_score
        if path and (path != self._best[0] or score is not self._best[1]):
            self._load(trainer, pl_module, path)
            self._best = path, score
        self._guide.is_active = bool(self._best[0])

    def _load(self, trainer: Trainer, pl_module: LightningModule, path: str) -> None:
        """Give the teacher the weights of a checkpoint of the student."""
        assert self._model is not None
        checkpoint = trainer.strategy.load_checkpoint(path)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{path} is no Lightning checkpoint")
        try:
            self._model.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit {type(pl_module).__name__} as it is; for another class or size pass the teacher "
                f"as a module: {error}"
            ) from error


def _monitored(trainer: Trainer) -> Any:
    """The trainer's checkpoint callback that knows a best."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) and getattr(callback, "save_top_k", 1):
            return callback
    raise ValueError("Distill('best') needs a ModelCheckpoint with a monitor in the trainer")


def _is_replaced(trainer: Trainer) -> bool:
    """Whether the stages of a `Quantize` with a teacher of their own have begun."""
    quantizes = [c for c in trainer.callbacks if isinstance(c, Quantize) and c.enabled and c.finetune.guidance]
    return any(quantize.state_dict()["stage"] for quantize in quantizes)


def _check_separate(student: nn.Module, teacher: nn.Module) -> None:
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ValueError("the teacher shares parameters with the student, which freezing it would freeze; pass a copy")
