"""Packed layers: the user's own module whose weight is a `PackedWeight`, with a forward of our own where that pays.

Any module can hold a packed weight: its attribute becomes a property that decodes. `@packs(nn.Linear)` adds a forward
that hands the packed weight the whole product instead, so that a scheme with a kernel never decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from lightning_qnoise.layers.swap import blank, own_class, plain_state, readers
from lightning_qnoise.schemes import PackedWeight

_FORWARDS: dict[Callable, type[PackedLayer]] = {}
_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
_Layer = TypeVar("_Layer", bound="type[PackedLayer]")


class PackedLayer(nn.Module):
    """Mixin of every module with packed weights; state-dict keys are `<layer>.weight.codes` and so on.

    `load_state_dict` also takes a float `<layer>.weight`: it is encoded, so that a checkpoint from before packing
    (`trainer.test(ckpt_path="best")`) loads into the packed model.

    Attributes:
        inputs: Of each parameter that can quantize what enters it, those arguments of the forward.
    """

    inputs: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def arguments(cls) -> tuple[str, ...]:
        """Return those arguments in the order of the forward."""
        return tuple(dict.fromkeys(name for names in cls.inputs.values() for name in names))

    @classmethod
    def serves(cls, names: Collection[str]) -> bool:
        """Whether its forward works where the parameters `names` are packed."""
        return "weight" in names

    def packed(self, name: str) -> PackedWeight:
        """Return the packed weight behind the attribute `name`."""
        module = self._modules[name]
        assert isinstance(module, PackedWeight)
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in packed_names(self):
            if prefix + name in state_dict:
                weight, packed = state_dict.pop(prefix + name), self.packed(name)
                if weight.shape == packed.shape:
                    packed = packed.scheme.encode(weight)
                else:
                    shapes = f"{list(weight.shape)} in the checkpoint, {list(packed.shape)} in the packed model"
                    args[-1].append(f"size mismatch for {prefix + name}: {shapes}")
                state = packed.state_dict() | self.packed(name).input_state()  # a range outlives its weight
                state_dict.update({f"{prefix}{name}.{key}": tensor for key, tensor in state.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (_base(self), packed_names(self)), plain_state(self)


def packs(layer: type[nn.Module]) -> Callable[[_Layer], _Layer]:
    """Register the packed counterpart of a layer class: used for it and for subclasses that keep its forward.

    Example:
        >>> @packs(nn.Bilinear)
        ... class PackedBilinear(PackedLayer):
        ...     def forward(self, a, b):
        ...         return nn.functional.bilinear(a, b, self.packed("weight").decode(), self.bias)
    """

    def register(packed: _Layer) -> _Layer:
        _FORWARDS[layer.forward] = packed
        return packed

    return register


def forward_of(module: nn.Module) -> type[PackedLayer]:
    """Return whose forward a module has once it is packed."""
    return _FORWARDS.get(own_class(module).forward, PackedLayer)


def packed_names(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes of a module (not of its children) that hold packed weights."""
    return tuple(
        name
        for name, child in module._modules.items()
        if isinstance(child, PackedWeight) and name in module._parameters
    )


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Yield every packed weight of a model under each full name that it has (a tied one has several)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in packed_names(module):
            packed = module._modules[name]
            assert isinstance(packed, PackedWeight)
            yield f"{prefix}.{name}" if prefix else name, packed


def pack_layer(module: nn.Module, name: str, packed: PackedWeight) -> None:
    """Exchange the Parameter `module.name` for a packed weight, in place."""
    children = {**module._modules, name: packed}
    module._parameters[name] = None  # keeps the Parameter's place in the order
    module._modules.clear()
    module._modules.update({key: children.pop(key) for key in module._parameters if key in children})
    module._modules.update(children)  # after the packed weights, as they come after the Parameters
    module.__dict__.pop("_flat_weights", None)  # a recurrent layer's own references to its Parameters
    set_packed(module, True)


def unpack_layer(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Exchange the packed weight `module.name` for a Parameter, in place."""
    del module._modules[name]
    module._parameters[name] = parameter
    names = packed_names(module)
    set_packed(module, bool(names))
    if isinstance(module, nn.RNNBase) and not names:
        module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


def set_packed(module: nn.Module, is_packed: bool) -> None:
    """Give a module the class of a packed layer with its packed weights, if any, or its own class back, in place."""
    base = _base(module) if isinstance(module, PackedLayer) else type(module)
    module.__class__ = _packed_class(base, packed_names(module)) if is_packed else base


def _base(layer: nn.Module) -> type[nn.Module]:
    """The user's class of a packed layer."""
    return type(layer).__bases__[1]


def _decoded(module: nn.Module, name: str) -> Tensor:
    packed = module._modules[name]
    assert isinstance(packed, PackedWeight)
    return packed.read()


def _packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    key = (base, names)
    if key not in _CLASSES:
        mixin = _FORWARDS.get(base.forward, PackedLayer)
        mixin = mixin if mixin.serves(names) else PackedLayer
        namespace = {"__module__": base.__module__, **readers(base, names, _decoded)}
        _CLASSES[key] = type(f"Packed{base.__name__}", (mixin, base), namespace)
    return _CLASSES[key]


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    return blank(_packed_class(base, names))
