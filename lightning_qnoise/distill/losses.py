"""What a student is asked to share with its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the KL divergence of the teacher's soft targets from the student's (Hinton et al. 2015).

    Args:
        student: Logits `[..., classes]`.
        teacher: Logits of the same shape.
        temperature: Both are divided by it; the result is multiplied by its square, which keeps the gradient's scale.

    Returns:
        0-dim: the mean over all leading dimensions (torch's "batchmean" of the flattened logits), in fp32; zero where
        there are no rows.

    Raises:
        ValueError: The shapes differ, or there are less than two classes.

    Example:
        >>> import torch
        >>> soft_targets(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {list(student.shape)}, the teacher's {list(teacher.shape)}; "
            f"pass a loss of your own that compares them"
        )
    n_classes = student.shape[-1] if student.dim() else 0
    if n_classes < 2:
        raise ValueError(
            f"soft targets need two classes or more in the last dimension, got logits of shape {list(student.shape)}; "
            f"pass a loss of your own"
        )
    if not student.numel():
        return student.float().sum()
    log_p = F.log_softmax(student.reshape(-1, n_classes).float() / temperature, dim=-1)
    log_q = F.log_softmax(teacher.reshape(-1, n_classes).float() / temperature, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True)
class Guidance:
    """How a teacher guides: `(1 - alpha) * loss + alpha * part`, where the part is the teacher's.

    That is the mean of `loss(student's output, teacher's output)` over the calls of the target in a step, plus
    `feature_weight` times the sum over the pairs of features, each a mean over its calls.

    Args:
        alpha: Weight of the teacher's part, in [0, 1].
        temperature: That of `soft_targets`.
        loss: Any function of both outputs that returns a 0-dim tensor, instead of `soft_targets` on logits
            `[..., classes]`: a tensor or the entry `logits` of a mapping or object.
        target: Full name of the module whose outputs are compared. None finds the one module that `training_step`
            calls: the LightningModule itself, or its child.
        dtype: The teacher's dtype; half precision halves its memory. None keeps its own.
        features: Full names of the student's modules -> those of the teacher's modules whose outputs they are drawn
            towards (hints, Romero et al. 2015). A pair `(name, loss)` gives a function of both outputs instead of the
            mean squared error, for example one that compares shapes that differ.
        feature_weight: What the features' losses are multiplied by.
        outputs: Whether the target's outputs are compared at all; False compares features alone.

    Raises:
        ValueError: A number is out of range, the dtype is unknown, an entry of `features` is neither a name nor a
            pair, or there is nothing to compare.

    Example:
        >>> Guidance(alpha=0.7, features={"encoder": "backbone.encoder"}).pairs()[0][:2]
        ('encoder', 'backbone.encoder')
    """

    alpha: float = 0.5
    temperature: float = 1.0
    loss: Callable[[Any, Any], Tensor] | None = None
    target: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    features: Mapping[str, str | tuple[str, Callable[[Any, Any], Tensor]]] | None = None
    feature_weight: float = 1.0
    outputs: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.feature_weight < math.inf:
            raise ValueError(f"feature_weight must not be negative, got {self.feature_weight}")
        if self.dtype not in (None, "float16", "bfloat16", "float32"):
            raise ValueError(f"dtype must be float16, bfloat16, float32 or None, got {self.dtype!r}")

        if not self.outputs and not self.features:
            raise ValueError("there is nothing to compare: name features, or leave outputs=True")
        self.pairs()

    def pairs(self) -> list[tuple[str, str, Callable[[Any, Any], Tensor] | None]]:
        """Return the features as triples of the student's name, the teacher's, and a loss or None."""
        triples = []
        for name, entry in (self.features or {}).items():
            pair = (entry, None) if isinstance(entry, str) else entry
            is_named = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
            if not is_named or not (isinstance(entry, str) or callable(pair[1])):
                raise ValueError(f"features[{name!r}] must be the name of a module or (name, loss), got {entry!r}")
            triples.append((name, *pair))
        return triples

    def compare(self, student: Any, teacher: Any) -> Tensor:
        """Return the loss of one output of the target, 0-dim.

        Raises:
            TypeError: No `loss` is given and the outputs are not logits.
            ValueError: Their shapes differ, or `loss` returns something else than a 0-dim tensor.
        """
        if self.loss is not None:
            return _scalar(self.loss(student, teacher), "Guidance(loss=...)")
        return soft_targets(_logits(student), _logits(teacher), self.temperature)

    def compare_features(
        self, student: Mapping[str, Sequence[Any]], teacher: Mapping[str, Sequence[Any]]
    ) -> list[Tensor]:
        """Return the loss of every pair of features, 0-dim each, not weighted.

        Args:
            student: Name of a module -> what it returned, call by call.
            teacher: The same of the teacher's.

        Raises:
            TypeError: No loss is given for outputs that are not tensors.
            ValueError: Shapes or numbers of calls differ, or a loss returns something else than a 0-dim tensor.
        """
        return [mean_loss(student[a], teacher[b], _PairLoss(a, b, loss)) for a, b, loss in self.pairs()]


@dataclass(frozen=True)
class _PairLoss:
    """The loss of a pair of features, with errors that name both modules."""

    student: str
    teacher: str
    loss: Callable[[Any, Any], Tensor] | None

    def __str__(self) -> str:
        return f"features[{self.student!r}]"

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        if self.loss is not None:
            return _scalar(self.loss(student, teacher), f"the loss of {self}")
        pass_one = f"pass features={{{self.student!r}: ({self.teacher!r}, loss)}} with a loss that compares them"
        if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
            kinds = [type(output).__name__ for output in (student, teacher)]
            raise TypeError(
                f"{self.student!r} of the student returns a {kinds[0]}, {self.teacher!r} of the teacher "
                f"a {kinds[1]}; {pass_one}"
            )
        if student.shape != teacher.shape:
            raise ValueError(
                f"{self.student!r} of the student returns shape {list(student.shape)}, {self.teacher!r} of the teacher "
                f"{list(teacher.shape)}; {pass_one}"
            )
        return F.mse_loss(student.float(), teacher.float()) if student.numel() else student.float().sum()


def mean_loss(student: Sequence[Any], teacher: Sequence[Any], loss: Callable[[Any, Any], Tensor]) -> Tensor:
    """Return the mean of a loss over the calls of a module in one step.

    Raises:
        ValueError: The student's module was not called as often as the teacher's, or not at all.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"{loss}: the student's module gave {len(student)} outputs with a gradient in this step, the teacher's "
            f"{len(teacher)}; features must be computed within the target's calls, and neither be frozen nor lie "
            f"inside reentrant activation checkpointing"
        )
    return torch.stack([loss(a, b) for a, b in zip(student, teacher, strict=True)]).mean()


def _scalar(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim():
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must return a 0-dim tensor, got {found}")
    return value


def _logits(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or the entry `logits` of a mapping or an object."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"the target returns a {type(output).__name__} without logits; pass Guidance(loss=...)")
    return found
