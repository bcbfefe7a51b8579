"""See what a module is called with and what it returns, while another function runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Call:
    """One call of a module: what went in and what came out."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Capture:
    """Records the calls of a module, or of the outermost of several candidates, while `recording` is open.

    Args:
        model: The model.
        target: Full name of a module of it; None takes every module with parameters that is called from outside of
            the others.

    Attributes:
        names: Every module of the model and its full name.
        target: The name asked for, or that of the module found.

    Raises:
        ValueError: There is no such module.
    """

    def __init__(self, model: nn.Module, target: str | None = None) -> None:
        modules = dict(model.named_modules())
        if target is not None and target not in modules:
            raise ValueError(f"the model has no module {target!r} to distill from; its children are {_children(model)}")
        chosen = [modules[target]] if target is not None else [m for m in modules.values() if _has_parameters(m)]
        self.target = target
        self.names = {module: name for name, module in modules.items()}
        self._depth = 0
        self._calls: list[Call] | None = None
        self._handles: list[RemovableHandle] = []
        self._watch(chosen)

    def _watch(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Record into the list that this yields."""
        self._depth, self._calls = 0, []
        try:
            yield self._calls
        finally:
            self._calls = None

    def the_module(self, calls: list[Call]) -> nn.Module:
        """Return the module that was called, and from now on look at no other.

        Raises:
            ValueError: None was, or more than one.
        """
        called = {self.names[call.module]: call.module for call in calls}
        if len(called) != 1:
            what = f"calls {', '.join(called)}" if called else f"does not call {self.target or 'any module'}"
            raise ValueError(
                f"training_step {what}, so it is not clear whose outputs to compare with the teacher's; name the "
                f"module that returns the logits in Guidance(target=...)"
            )
        name, module = next(iter(called.items()))
        if self.target != name:
            self.target = name
            self.remove()
            self._watch([module])
        return module

    def remove(self) -> None:
        """Take all hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1
        if self._calls is not None and self._depth == 0:
            self._calls.append(Call(module, args, kwargs, output))


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _children(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children()) or "none"
