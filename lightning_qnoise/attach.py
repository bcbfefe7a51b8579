"""How noise enters a model: its layers read their weights through it while a training forward runs.

The Parameter is never written. Its layer gets a subclass of its own class in which the weight is a property, and the
property adds the noise only while the window is open: inside the forward of the layer or of the module that holds it
(which is who reads `out_proj.weight` of an attention layer, or a table tied by `F.linear(h, self.embed.weight)`).
Masks are drawn outside the graph, so recomputation under activation checkpointing sees the same noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_qnoise.input_noise import InputNoise
from lightning_qnoise.layers import quantizes_input
from lightning_qnoise.layers.swap import blank, plain_state, readers, retype, stored
from lightning_qnoise.noise import Kind, WeightNoise
from lightning_qnoise.schemes import Scheme
from lightning_qnoise.weights import owners

_NOISES, _OPENS, _INPUT = "_quant_noises", "_quant_noise_opens", "_quant_input_noise"


class NoisyLayer(nn.Module):
    """Mixin of a layer, or of the holder of a layer, whose forward opens the window of its noises."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward, on the noisy input where there is such noise."""
        noise = self.__dict__[_INPUT]
        if noise is not None and noise.active and (self.training or noise.in_eval):
            if args:
                args = (noise.apply(args[0], self.training), *args[1:])
            else:
                kwargs = {**kwargs, "input": noise.apply(kwargs["input"], self.training)}
        opens = self.__dict__[_OPENS]
        for noise in opens:
            noise.window += 1
        try:
            return super().forward(*args, **kwargs)
        finally:
            for noise in opens:
                noise.window -= 1
                if not noise.window:
                    noise.read.clear()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return blank, (type(self).__bases__[1],), plain_state(self, _NOISES, _OPENS, _INPUT)


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
    """Let what enters the layers of the named weights be noised, in place; one noise a layer, the newest.

    Args:
        model: The model.
        noises: Full parameter name -> the noise of its layers' inputs.
    """
    parameters = {name: parameter for name, _, _, parameter in owners(model)}
    of_parameter = {id(parameters[name]): noise for name, noise in noises.items()}
    for _, module, attribute, parameter in owners(model):
        if id(parameter) in of_parameter and quantizes_input(module, attribute):
            if not isinstance(module, NoisyLayer):
                _swap(module, {}, ())
            module.__dict__[_INPUT] = of_parameter[id(parameter)]


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
            del module.__dict__[_NOISES], module.__dict__[_OPENS], module.__dict__[_INPUT]
            retype(module, type(module).__bases__[1])


def _swap(module: nn.Module, noises: dict[str, WeightNoise], opens: Iterable[WeightNoise]) -> None:
    base = type(module)
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__, **readers(base, noises, _read)}
    module.__dict__.update({_NOISES: noises, _OPENS: tuple(opens), _INPUT: None})
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
