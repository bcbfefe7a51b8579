"""What a student is asked to share with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the KL divergence of the teacher's soft targets from the student's (Hinton et al. 2015).

    Args:
        student: Logits `[..., classes]`.
        teacher: Logits of the same shape.
        temperature: Both are divided by it; the result is multiplied by its square, which keeps the gradient's scale.

    Returns:
        0-dim: the mean over all leading dimensions (torch's "batchmean" of the flattened logits), in fp32.

    Raises:
        ValueError: The shapes differ.

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
    n_classes = student.shape[-1]
    log_p = F.log_softmax(student.reshape(-1, n_classes).float() / temperature, dim=-1)
    log_q = F.log_softmax(teacher.reshape(-1, n_classes).float() / temperature, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True)
class Guidance:
    """How a teacher guides: `(1 - alpha) * loss + alpha * loss_of(student's output, teacher's output)`.

    Args:
        alpha: Weight of the teacher's part, in [0, 1].
        temperature: That of `soft_targets`.
        loss: Any function of both outputs that returns a 0-dim tensor, instead of `soft_targets` on logits.
        target: Full name of the module whose outputs are compared. None finds the one module that `training_step`
            calls: the LightningModule itself, or its child.
        dtype: The teacher's dtype; half precision halves its memory. None keeps the student's.

    Raises:
        ValueError: `alpha` or `temperature` is out of range, or the dtype is unknown.

    Example:
        >>> Guidance(alpha=0.7, temperature=2.0).alpha
        0.7
    """

    alpha: float = 0.7
    temperature: float = 2.0
    loss: Callable[[Any, Any], Tensor] | None = None
    target: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.dtype not in (None, "float16", "bfloat16", "float32"):
            raise ValueError(f"dtype must be float16, bfloat16, float32 or None, got {self.dtype!r}")

    def compare(self, student: Any, teacher: Any) -> Tensor:
        """Return the teacher's part of the loss, 0-dim.

        Raises:
            TypeError: No `loss` is given and the outputs are not logits.
        """
        if self.loss is not None:
            return self.loss(student, teacher)
        return soft_targets(_logits(student), _logits(teacher), self.temperature)


def _logits(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or the entry `logits` of a mapping or an object."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"the target returns a {type(output).__name__} without logits; pass Guidance(loss=...)")
    return found
