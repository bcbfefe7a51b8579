"""A teacher at work: it sees what the student's training step feeds its model, and its answer enters the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_qnoise.distill.capture import Call, Capture
from lightning_qnoise.distill.losses import Guidance


class Guide:
    """Wraps `training_step` of a module on the instance, so that the loss it returns is a teacher's as well.

    The module's class, parameters, state dict and hooks of others stay as they are. The teacher is called with the
    arguments of the student's target, frozen and in eval mode.

    Args:
        student: A module with a `training_step`.
        teacher: Either a copy of the whole student, in which the target has the same name, or (`whole=False`) a module
            to call instead of the target. It is frozen and put in eval mode.
        guidance: How.
        whole: See `teacher`.

    Raises:
        ValueError: The student has no module of the target's name.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, guidance: Guidance, whole: bool = True) -> None:
        self.teacher = teacher.requires_grad_(False).eval()
        if guidance.dtype is not None:
            self.teacher.to(getattr(torch, guidance.dtype))
        self.guidance = guidance
        self._whole = whole
        self._student = student
        self._capture = Capture(student, guidance.target)
        self._step: Callable[..., Any] = student.training_step  # type: ignore[assignment]
        self._shadowed = student.__dict__.get("training_step")
        student.__dict__["training_step"] = self._wrap()
        self.last: Tensor | None = None

    def detach(self) -> None:
        """Give the student its own `training_step` back."""
        self._capture.remove()
        del self._student.__dict__["training_step"]
        if self._shadowed is not None:
            self._student.__dict__["training_step"] = self._shadowed

    def _wrap(self) -> Any:
        @wraps(self._step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with self._capture.recording() as calls:
                result = self._step(*args, **kwargs)
            if not torch.is_grad_enabled():  # BatchNorm statistics being estimated: nobody reads the loss
                return result
            return self._guided(result, calls)

        return training_step

    def _guided(self, result: Any, calls: list[Call]) -> Any:
        loss = result["loss"] if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"a teacher needs a training_step that returns a loss, got {type(loss).__name__}; with manual "
                f"optimization switch the guidance off"
            )
        target = self._capture.the_module(calls)
        parts = [self.guidance.compare(call.output, self._answer(target, call)) for call in calls]
        self.last = torch.stack(parts).mean()
        guided = (1 - self.guidance.alpha) * loss + self.guidance.alpha * self.last.to(loss.dtype)
        return {**result, "loss": guided} if isinstance(result, Mapping) else guided

    @torch.no_grad()
    def _answer(self, target: nn.Module, call: Call) -> Any:
        teacher = self.teacher
        if self._whole:
            teacher = teacher.get_submodule(self._capture.names[target])
        parameter = next(self.teacher.parameters(), None)
        dtype = None if parameter is None else parameter.dtype

        def to_teacher(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value

        return teacher(*tree_map(to_teacher, call.args), **tree_map(to_teacher, call.kwargs))


class Rehearsal(Guide):
    """Finds out in the first training step whether a guide will do, and takes itself away.

    Raises:
        ValueError, TypeError: In that step, as a guide would.
    """

    def __init__(self, student: nn.Module, guidance: Guidance) -> None:
        super().__init__(student, nn.Identity(), guidance)
        self.is_over = False

    def _guided(self, result: Any, calls: list[Call]) -> Any:
        super()._guided(result, calls)
        self.detach()
        return result

    def _answer(self, target: nn.Module, call: Call) -> Any:
        return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, call.output)

    def detach(self) -> None:
        """Take the wrapper away, once."""
        if not self.is_over:
            self.is_over = True
            super().detach()
