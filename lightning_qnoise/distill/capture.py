"""See what a module is called with and what it returns, while another function runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Call:
    """One call of a module: what went in and what came out."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def has_gradient(self) -> bool:
        """Whether a loss on the output can train anything."""
        return has_gradient(self.output)


class Capture:
    """Records the calls of a module, or of the outermost of several candidates, while `recording` is open.

    Hooks are there only as long; a copy of the model made in between has none.

    Args:
        model: The model.
        target: Full name of a module of it; None takes every module with parameters that is called from outside of
            the others. Calls within a torch.compile'd module are not looked at.

    Attributes:
        names: Every module of the model and its full name.
        target: The name asked for, or that of the module found.

    Raises:
        ValueError: There is no such module.
    """

    def __init__(self, model: nn.Module, target: str | None = None) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.target = target
        self._depth = 0
        self._calls: list[Call] = []
        if target is None:
            self._modules = [m for m, name in self.names.items() if _has_parameters(m) and "_orig_mod" not in name]
        else:
            self._modules = [find_module(model, target, "model")]
            self.names[self._modules[0]] = target

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Record into the list that this yields."""
        self._depth, self._calls = 0, []
        handles = [module.register_forward_pre_hook(self._enter) for module in self._modules]
        for module in self._modules:
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        with _removing(handles):
            yield self._calls

    def the_module(self, calls: list[Call]) -> nn.Module:
        """Return the module that was called, and from now on look at no other.

        Raises:
            ValueError: None was, or more than one.
        """
        called = {self.names[call.module]: call.module for call in calls}
        if len(called) != 1:
            who = self.target or "any module"
            what = f"calls {', '.join(name or 'itself' for name in called)}" if called else f"does not call {who}"
            raise ValueError(
                f"training_step {what}, so it is not clear whose outputs to compare with the teacher's; name the "
                f"module that returns the logits in Guidance(target=...)"
            )
        self.target, module = next(iter(called.items()))
        self._modules = [module]
        return module

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and output is not None:  # None: forward raised
            self._calls.append(Call(module, args, kwargs, output))


class Taps:
    """Keeps what named modules return while `recording` is open.

    Args:
        model: The model.
        names: Full names of modules of it.
        whose: What the model is called in errors.

    Raises:
        ValueError: There is no such module.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with Taps(model, ["0"], "student").recording() as seen:
        ...     output = model(torch.zeros(2, 4))
        >>> [output.shape for output in seen["0"]]
        [torch.Size([2, 3])]
    """

    def __init__(self, model: nn.Module, names: Iterable[str], whose: str) -> None:
        self._modules = {name: find_module(model, name, whose) for name in names}

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Any]]]:
        """Record into the lists that this yields, one a name."""
        outputs: dict[str, list[Any]] = {name: [] for name in self._modules}

        def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
            outputs[name].append(output)

        handles = [m.register_forward_hook(partial(keep, name)) for name, m in self._modules.items()]
        with _removing(handles):
            yield outputs


@contextmanager
def _removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_module(model: nn.Module, name: str, whose: str) -> nn.Module:
    """Return a module by its full name.

    Raises:
        ValueError: There is none, in words that list what there is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        children = ", ".join(child for child, _ in model.named_children()) or "none"
        raise ValueError(f"the {whose} has no module {name!r} to distill; its children are {children}")
    return modules[name]


def has_gradient(output: Any) -> bool:
    """Return whether a tensor in an output requires a gradient, or no tensor can be found in it."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return not tensors or any(tensor.requires_grad for tensor in tensors)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
