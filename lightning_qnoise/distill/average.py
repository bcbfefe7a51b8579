"""A teacher that follows its student: the exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """The exponential moving average of a model's parameters, in a copy of it (Tarvainen & Valpola 2017).

    After update `t` the average is `d * average + (1 - d) * parameters` with `d = min(decay, t / (t + 1))`: the plain
    mean of the first values, until the decay takes over. It is kept in fp32 or wider, whatever the copy's dtype.
    Buffers are those of the model at the last update.

    Args:
        model: The model; the average starts from its values.
        decay: In [0, 1).
        dtype: That of the copy; None keeps the model's.

    Attributes:
        model: The copy, which follows every update.
        n_updates: How many there were.

    Raises:
        ValueError: The decay is out of range.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> average = MovingAverage(model, decay=0.999)
        >>> average.update(model)
        >>> torch.allclose(average.model.weight, model.weight)
        True
    """

    def __init__(self, model: nn.Module, decay: float, dtype: torch.dtype | None = None) -> None:
        check_decay(decay)
        self.decay = decay
        self.n_updates = 0
        self.model = deepcopy(model).requires_grad_(False).to(dtype=dtype)
        self._means: dict[str, Tensor] = {}  # its own parameters where they are wide enough
        own = dict(self.model.named_parameters())
        for name, value in model.named_parameters():
            if value.is_floating_point():
                wide = torch.promote_types(value.dtype, torch.float32)
                shared = own[name].dtype == wide
                self._means[name] = own[name].data if shared else value.detach().to(wide, copy=True)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's values of the moment into the average."""
        self.n_updates += 1
        decay = min(self.decay, self.n_updates / (self.n_updates + 1))
        values = dict(model.named_parameters())
        now = [values[name].detach().to(mean.dtype) for name, mean in self._means.items()]
        get_ema_multi_avg_fn(decay)(list(self._means.values()), now, 0)
        buffers = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        self._show()

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers, from which `load_state_dict` goes on bit-equally."""
        buffers = {name: buffer.detach() for name, buffer in self.model.named_buffers()}
        return {"n_updates": self.n_updates, "means": dict(self._means), "buffers": buffers}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned.

        Raises:
            ValueError: It is of another model.
        """
        buffers = dict(self.model.named_buffers())
        for mine, theirs in ((self._means, state["means"]), (buffers, state["buffers"])):
            if {k: t.shape for k, t in mine.items()} != {k: t.shape for k, t in theirs.items()}:
                raise ValueError("the checkpoint's moving average is of another model")
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.n_updates = state["n_updates"]
        self._show()

    def _show(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self._means and parameter.dtype != self._means[name].dtype:
                parameter.copy_(self._means[name])


def check_decay(decay: float) -> None:
    """Raise a ValueError unless the decay lies in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
