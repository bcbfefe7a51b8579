"""A teacher at work: it sees what the student's training step feeds its model, and its answer enters the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_qnoise.distill.capture import Call, Capture, Taps, has_gradient
from lightning_qnoise.distill.losses import Guidance, mean_loss


class Guide:
    """Wraps `training_step` of a module on the instance, so that the loss it returns is a teacher's as well.

    The module's class, parameters, state dict and hooks of others stay as they are. The teacher is called with the
    arguments of the student's target, without gradients. Calls of the target whose outputs have no gradient (under
    `torch.no_grad`) are left out, and so is a step that returns None. Guides can be stacked, and detached in any order.

    Args:
        student: A module with a `training_step`.
        teacher: Either a copy of the whole student, in which the target has the same name, or (`whole=False`) a module
            to call instead of the target. It is frozen and put in eval mode.
        guidance: How.
        whole: See `teacher`.

    Attributes:
        is_active: False lets every call through.
        last: The teacher's part of the loss in the last step, 0-dim, without graph; None where it had none.

    Raises:
        ValueError: The student has no module of the target's name, or one of both has not that of a feature.

    Example:
        >>> class Student(nn.Linear):
        ...     def training_step(self, batch):
        ...         return self(batch).logsumexp(dim=1).mean()
        >>> student = Student(4, 3)
        >>> guide = Guide(student, nn.Linear(4, 3), Guidance(), whole=False)
        >>> student.training_step(torch.zeros(2, 4)).requires_grad
        True
        >>> guide.detach()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, guidance: Guidance, whole: bool = True) -> None:
        self.teacher = teacher.requires_grad_(False).eval()
        if guidance.dtype is not None:
            self.teacher.to(getattr(torch, guidance.dtype))
        self.guidance = guidance
        self.is_active = True
        self.last: Tensor | None = None
        self._whole = whole
        self._student = student
        self._taps, self._teacher_taps = self._tap()
        self._capture = Capture(student, guidance.target)
        self._is_over = False
        self._step: Callable[..., Any] = student.training_step  # type: ignore[assignment]
        self._shadowed = student.__dict__.get("training_step")
        self._wrapper = student.__dict__["training_step"] = self._wrap()

    def detach(self) -> None:
        """Give the student its own `training_step` back; a second call does nothing.

        Below another wrapper that is still there, this one lets every call through until that one is gone as well.
        """
        self._is_over = True
        top = self._student.__dict__.get("training_step")
        while (guide := vars(top).get("guide") if callable(top) else None) and guide._wrapper is top and guide._is_over:
            top = guide._shadowed
            if top is None:
                del self._student.__dict__["training_step"]
            else:
                self._student.__dict__["training_step"] = top

    def _tap(self) -> tuple[Taps, Taps]:
        pairs = self.guidance.pairs()
        taps = Taps(self._student, [pair[0] for pair in pairs], "student")
        return taps, Taps(self.teacher, [pair[1] for pair in pairs], "teacher")

    def _wrap(self) -> Callable[..., Any]:
        @wraps(self._step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.last = None
            if self._is_over or not self.is_active:
                return self._step(*args, **kwargs)
            with self._capture.recording() as calls, self._taps.recording() as seen:
                result = self._step(*args, **kwargs)
            if result is None or not torch.is_grad_enabled():  # BatchNorm statistics being estimated
                return result
            return self._guided(result, calls, seen)

        vars(training_step)["guide"] = self
        return training_step

    def _guided(self, result: Any, calls: list[Call], seen: dict[str, list[Any]]) -> Any:
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"a teacher needs a training_step that returns a loss, got {type(loss).__name__}; with manual "
                f"optimization switch the guidance off"
            )
        target = self._capture.the_module(calls)
        calls = [call for call in calls if call.has_gradient]
        if not calls:
            raise ValueError(
                f"the outputs of {self._capture.target or 'the model'!r} have no gradient in training_step, so a "
                f"teacher cannot guide them"
            )
        part = self._compare(target, calls, seen)
        self.last = part.detach()
        guided = (1 - self.guidance.alpha) * loss + self.guidance.alpha * part.to(loss.dtype)
        return {**result, "loss": guided} if isinstance(result, Mapping) else guided

    def _compare(self, target: nn.Module, calls: list[Call], seen: dict[str, list[Any]]) -> Tensor:
        answers, taught = self._teach(target, calls, seen)
        parts: list[Tensor] = []
        if self.guidance.outputs:
            parts.append(mean_loss([call.output for call in calls], answers, self.guidance.compare))
        seen = {name: [output for output in outputs if has_gradient(output)] for name, outputs in seen.items()}
        parts += [self.guidance.feature_weight * loss for loss in self.guidance.compare_features(seen, taught)]
        return torch.stack(parts).sum()

    def _teach(
        self, target: nn.Module, calls: list[Call], seen: dict[str, list[Any]]
    ) -> tuple[list[Any], dict[str, list[Any]]]:
        """The teacher's outputs, call by call, and its features."""
        with self._teacher_taps.recording() as taught:
            return [self._answer(target, call) for call in calls], taught

    @torch.no_grad()
    def _answer(self, target: nn.Module, call: Call) -> Any:
        teacher = self.teacher
        if self._whole:
            teacher = teacher.get_submodule(self._capture.names[target])
        parameter = next(self.teacher.parameters(), None)
        dtype = None if parameter is None else parameter.dtype
        if self.guidance.dtype is not None:
            dtype = getattr(torch, self.guidance.dtype)

        def to_teacher(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value

        return teacher(*tree_map(to_teacher, call.args), **tree_map(to_teacher, call.kwargs))


class Rehearsal(Guide):
    """Finds out in the first training step whether a guide will do, and takes itself away.

    The student plays its own teacher: a copy of it will have the same names and shapes.

    Raises:
        ValueError, TypeError: In that step, as a guide would.
    """

    def __init__(self, student: nn.Module, guidance: Guidance) -> None:
        super().__init__(student, nn.Identity(), guidance)

    @property
    def is_over(self) -> bool:
        """Whether it has taken itself away."""
        return self._is_over

    def _tap(self) -> tuple[Taps, Taps]:
        names = [name for pair in self.guidance.pairs() for name in pair[:2]]
        return Taps(self._student, names, "model"), Taps(self.teacher, [], "teacher")

    def _guided(self, result: Any, calls: list[Call], seen: dict[str, list[Any]]) -> Any:
        super()._guided(result, calls, seen)
        self.detach()
        return result

    def _teach(
        self, target: nn.Module, calls: list[Call], seen: dict[str, list[Any]]
    ) -> tuple[list[Any], dict[str, list[Any]]]:
        def without_graph(value: Any) -> Any:
            return value.detach() if isinstance(value, Tensor) else value

        outputs = {name: [output for output in outputs if has_gradient(output)] for name, outputs in seen.items()}
        return [tree_map(without_graph, call.output) for call in calls], tree_map(without_graph, outputs)
