"""How noise enters a model: its layers read their weights through it while a training forward runs.

The Parameter is never written. Its layer gets a subclass of its own class in which the weight is a property, and the
property adds the noise only while the window is open: inside the forward of the layer or of the module that holds it
(which is who reads `out_proj.weight` of an attention layer, or a table tied by `F.linear(h, self.embed.weight)`).
Masks are drawn outside the graph, so recomputation under activation checkpointing sees the same noise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from lightning_qnoise.input_noise import InputNoise
from lightning_qnoise.layers import attend, forward_of, input_names
from lightning_qnoise.layers.swap import blank, plain_state, readers, retype, stored
from lightning_qnoise.noise import Kind, WeightNoise
from lightning_qnoise.schemes import Scheme
from lightning_qnoise.weights import owners

_NOISES, _OPENS = "_quant_noises", "_quant_noise_opens"
_INPUTS, _CALLED, _HOOK = "_quant_input_noises", "_quant_noise_called", "_quant_noise_hook"
_OWN = (_NOISES, _OPENS, _INPUTS, _CALLED, _HOOK)


class NoisyLayer(nn.Module):
    """Mixin of a layer, or of the holder of a layer, whose forward opens the window of its noises."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward, on noisy inputs where there is such noise."""
        inputs = self.__dict__[_INPUTS]
        if inputs:
            args, kwargs = _enter(inputs, self.training, args, kwargs)
        opens = self.__dict__[_OPENS]
        for noise in opens:
            noise.window += 1
        try:
            called = self.__dict__[_CALLED]
            if called is not None and called.is_on(self.training):
                return attend(cast(nn.MultiheadAttention, self), *args, **kwargs)
            return super().forward(*args, **kwargs)
        finally:
            for noise in opens:
                noise.window -= 1
                if not noise.window:
                    noise.read.clear()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        state, hook = plain_state(self, *_OWN), self.__dict__[_HOOK]
        if hook is not None:
            hooks = state["_forward_pre_hooks"].items()
            state["_forward_pre_hooks"] = OrderedDict((key, own) for key, own in hooks if key != hook.id)
        return blank, (type(self).__bases__[1],), state


def attach(model: nn.Module, schemes: Mapping[str, Scheme], kind: Kind = "exact") -> dict[str, WeightNoise]:
    """Let the named weights of a model be noised, in place; until masks are drawn nothing changes.

    Args:
        model: The model.
        schemes: Full parameter name -> scheme, as `resolve` returns it.
        kind: See `WeightNoise`.

    Returns:
        The noise of every weight: parameter name -> `WeightNoise`.
    """
    parameters = {name: parameter for name, _, _, parameter in owners(model)}
    noises = {name: WeightNoise(parameters[name], scheme, kind) for name, scheme in schemes.items()}
    of_parameter = {id(parameters[name]): noise for name, noise in noises.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    read: dict[nn.Module, dict[str, WeightNoise]] = {}
    opens: dict[nn.Module, dict[int, WeightNoise]] = {}
    for name, module, attribute, parameter in owners(model):
        noise = of_parameter.get(id(parameter))
        if noise is not None:
            read.setdefault(module, {})[attribute] = noise
            for opener in {module, _holder(modules, name.rpartition(".")[0])}:
                opens.setdefault(opener, {})[id(noise)] = noise
    for module, found in opens.items():
        _swap(module, read.get(module, {}), found.values())
    return noises


def attach_inputs(model: nn.Module, noises: Mapping[str, InputNoise]) -> None:
    """Let what enters the layers of the named weights be noised, in place; one noise a weight, the newest.

    Args:
        model: The model.
        noises: Full parameter name -> the noise of its layers' inputs.
    """
    parameters = {name: parameter for name, _, _, parameter in owners(model)}
    of_parameter = {id(parameters[name]): noise for name, noise in noises.items()}
    takers = input_names(model)
    noised = set()
    for _, module, attribute, parameter in owners(model):
        if id(parameter) in of_parameter and (module, attribute) in takers:
            noise = of_parameter[id(parameter)]
            noised.add(module)
            _inputs(module).update(dict.fromkeys(takers[module, attribute], noise))
            if noise.in_eval and module.__dict__[_HOOK] is None:
                module.__dict__[_HOOK] = module.register_forward_pre_hook(_stay)
    for module in list(model.modules()):
        if (module, "in_proj_weight") in takers and module.out_proj in noised:  # torch's own would only read it
            _inputs(module)
            module.__dict__[_CALLED] = module.out_proj.__dict__[_INPUTS]["input"]


def _stay(module: nn.Module, args: Any) -> None:
    """In eval mode nn.TransformerEncoderLayer bypasses its layers, but where one has a hook."""


def _inputs(module: nn.Module) -> dict[str, InputNoise | None]:
    """Argument of a layer's forward -> its noise; the layer is made noisy if it is not."""
    if not isinstance(module, NoisyLayer):
        _swap(module, {}, ())
    if not module.__dict__[_INPUTS]:
        module.__dict__[_INPUTS] = dict.fromkeys(forward_of(module).arguments())
    return module.__dict__[_INPUTS]


def _enter(
    inputs: Mapping[str, InputNoise | None], in_training: bool, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a forward as its layer reads them; one that comes twice stays one (self-attention)."""
    names = [*inputs]
    n, given = min(len(args), len(names)), [name for name in names if name in kwargs]
    values, noises = [*args[:n], *(kwargs[name] for name in given)], [inputs[name] for name in (*names[:n], *given)]
    done: list[Any] = []
    for place, (noise, x) in enumerate(zip(noises, values, strict=True)):
        twins = [done[i] for i in range(place) if values[i] is x and noises[i] is noise]
        if not twins and noise is not None and noise.is_on(in_training):
            x = noise.apply(x, in_training)
        done.append(twins[0] if twins else x)
    return (*done[:n], *args[n:]), {**kwargs, **dict(zip(given, done[n:], strict=True))}


def _holder(modules: Mapping[str, nn.Module], layer: str) -> nn.Module:
    """The nearest module above a layer that has a forward: containers such as ModuleDict are passed over."""
    holder = layer.rpartition(".")[0]
    while holder and type(modules[holder]).forward is nn.Module.forward:
        holder = holder.rpartition(".")[0]
    return modules[holder]


def detach(model: nn.Module) -> None:
    """Give every module of a model its own class back, in place."""
    for module in model.modules():
        if isinstance(module, NoisyLayer):
            if module.__dict__[_HOOK] is not None:
                module.__dict__[_HOOK].remove()
            for name in _OWN:
                del module.__dict__[name]
            retype(module, type(module).__bases__[1])


def _swap(module: nn.Module, noises: dict[str, WeightNoise], opens: Iterable[WeightNoise]) -> None:
    base = type(module)
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__, **readers(base, noises, _read)}
    module.__dict__.update({_NOISES: noises, _OPENS: tuple(opens), _INPUTS: {}, _CALLED: None, _HOOK: None})
    retype(module, type(f"Noisy{base.__name__}", (NoisyLayer, base), namespace))


def _read(module: nn.Module, name: str) -> Any:
    weight = stored(module, name)
    noise = module.__dict__[_NOISES][name]
    if not (noise.active and module.training and (noise.window or _is_recomputing())):
        return weight
    if not noise.window:
        return noise.apply(weight)
    gradients = torch.is_grad_enabled()
    if gradients not in noise.read:
        noise.read[gradients] = noise.apply(weight)
    return noise.read[gradients]


def _is_recomputing() -> bool:
    """Whether a backward pass is running: it reads weights only to repeat a forward (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1
