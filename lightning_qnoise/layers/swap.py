"""Give one module a subclass of its own class in which some attributes read differently; nothing else changes.

Noise and packed layers both enter a model this way: the object, its hooks, its Parameters and every reference to it
stay what they were, and whoever reads `module.weight` (the module itself, `F.multi_head_attention_forward`, a tied
output projection) gets the value that the property gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

Read = Callable[[nn.Module, str], Any]


def retype(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module, in place.

    Lightning's DDP leaves the module's bound `forward` on the instance, where it would shadow that of the new class.
    """
    if "forward" in module.__dict__ and not has_own_forward(module):
        del module.__dict__["forward"]
    module.__class__ = cls


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward was set on the object, in place of that of its class."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the user's class of a module that may have been swapped."""
    cls = type(module)
    while "_is_swapped" in cls.__dict__:
        cls = cls.__bases__[1]
    return cls


def stored(module: nn.Module, name: str) -> Any:
    """Return what `module.name` was before any property: a Parameter, an instance attribute or a class property."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return parameter
    if name in module.__dict__:
        return module.__dict__[name]
    for cls in type(module).__mro__[1:]:
        if isinstance(cls.__dict__.get(name), property):
            return cls.__dict__[name].fget(module)
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")


def readers(base: type[nn.Module], names: Iterable[str], read: Read) -> dict[str, Any]:
    """Return the attributes of a class in which each of `names` reads through `read(module, name)`.

    A recurrent layer reads its weights from a list that torch keeps beside them; that list becomes a property too.
    """
    properties: dict[str, Any] = {"_is_swapped": True}
    properties |= {name: _property(name, read) for name in names}
    if issubclass(base, nn.RNNBase):
        properties["_flat_weights"] = property(_flat_weights, lambda module, value: None)
    return properties


def _property(name: str, read: Read) -> property:
    def get(module: nn.Module) -> Any:  # a plain function, not a partial: torch 2.6 compiles no other getter
        return read(module, name)

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = value

    def delete(module: nn.Module) -> None:
        del module.__dict__[name]

    return property(get, write, delete)


def _flat_weights(module: nn.Module) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]  # type: ignore[union-attr]


def plain_state(module: nn.Module, *private: str) -> dict[str, Any]:
    """Return what pickle and deepcopy should take of a swapped module: its state without our private attributes."""
    getstate = getattr(module, "__getstate__", None)  # object has one from Python 3.11 on
    state = getstate() if getstate is not None else module.__dict__
    return {key: value for key, value in state.items() if key not in private}


def blank(cls: type[nn.Module]) -> nn.Module:
    """Return an object of `cls` without running its constructor, for pickle and deepcopy to fill."""
    return cls.__new__(cls)
