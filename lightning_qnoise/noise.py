"""Quant-Noise: in a training forward a random subset of weight blocks reads as its quantized value.

The Parameter is never written. Its layer gets a subclass of its own class in which the weight is a property, and the
property adds the noise only while the window is open: inside the forward of the layer or of the module that holds it
(which is who reads `out_proj.weight` of an attention layer, or a table tied by `F.linear(h, self.embed.weight)`).
Masks are drawn outside the graph, so recomputation under activation checkpointing sees the same noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_qnoise.layers.swap import blank, plain_state, readers, retype, stored
from lightning_qnoise.schemes import PackedWeight, Scheme, matrix_shape
from lightning_qnoise.weights import owners

Kind = Literal["exact", "zero", "mean"]
KINDS = ("exact", "zero", "mean")


def quant_noise(weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Replace the masked blocks of a weight by a target, with a straight-through gradient (Fan et al., eq. 5 and 6).

    Args:
        weight: Float weight.
        target: What the blocks become; broadcasts against the blocks `[rows, blocks, unit]`.
        mask: bool `[rows, blocks]`, true where a block is replaced.

    Returns:
        The noisy weight, of the shape and dtype of `weight`. Its gradient with respect to `weight` is the identity
        on every element.

    Example:
        >>> weight = torch.ones(1, 4, requires_grad=True)
        >>> quant_noise(weight, torch.zeros(()), torch.tensor([[True, False]]))
        tensor([[0., 0., 1., 1.]], grad_fn=<AddBackward0>)
    """
    value = weight.detach()
    blocks = value.reshape(*mask.shape, -1)
    noisy = torch.where(mask[..., None], target, blocks).view(weight.shape)
    return weight - value + noisy  # the difference is exactly zero; it carries the gradient


class WeightNoise:
    """The noise of one Parameter, shared by all of its owners.

    Args:
        weight: The Parameter.
        scheme: What it will become.
        kind: `"exact"` replaces a block by its quantized value, `"zero"` by zeros (the paper's phi_proxy), `"mean"`
            by the mean block of the weight. Schemes that distort single elements (`Int`) are always exact.

    Attributes:
        has_codebook: Whether the noise reads an encoding that outlives the batch: that of exact PQ, whereas `Int`
            quantizes the weight of the moment.
        target: That encoding; made at the first draw, and given anew to refresh the codebook.
        window: How many forwards that may read the noise are running.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, kind: Kind = "exact") -> None:
        self.scheme = scheme
        self.shape = weight.shape
        rows, cols = matrix_shape(weight.shape)
        self.unit = scheme.noise_blocks(weight.shape)[1]
        self.kind: Kind = kind if self.unit > 1 else "exact"
        self.mask = torch.zeros(rows, cols // self.unit, dtype=torch.bool, device=weight.device)
        empty = scheme.empty(weight.shape, weight.dtype, "meta")
        self.has_codebook = self.kind == "exact" and type(empty).project is PackedWeight.project
        self.target: PackedWeight | None = None if self.has_codebook else empty
        self.active = False
        self.window = 0

    def encode(self, weight: Tensor) -> PackedWeight:
        """Return the encoding of the weight of the moment, clustered from the previous one where there is one."""
        return self.scheme.encode(weight.detach(), self.target)

    def draw(self, weight: Tensor, rate: float, generator: torch.Generator) -> None:
        """Draw the blocks of the next forwards: each with probability `rate`."""
        self.active = rate > 0
        if not self.active:
            return
        self.mask.bernoulli_(rate, generator=generator)
        if self.has_codebook:
            self.target = self.target or self.encode(weight)
            self.target.follow(weight, self.mask)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the weight as a forward reads it."""
        return quant_noise(weight, self._target(weight), self.mask)

    @torch.no_grad()
    def _target(self, weight: Tensor) -> Tensor:
        if self.kind == "exact":
            assert self.target is not None
            return self.target.project(weight).reshape(*self.mask.shape, -1)
        if self.kind == "zero":
            return weight.new_zeros(())
        return weight.detach().reshape(-1, self.unit).mean(dim=0)


_NOISES, _OPENS = "_quant_noises", "_quant_noise_opens"


class NoisyLayer(nn.Module):
    """Mixin of a layer, or of the holder of a layer, whose forward opens the window of its noises."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward."""
        opens = self.__dict__[_OPENS]
        for noise in opens:
            noise.window += 1
        try:
            return super().forward(*args, **kwargs)
        finally:
            for noise in opens:
                noise.window -= 1

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return blank, (type(self).__bases__[1],), plain_state(self, _NOISES, _OPENS)


def attach(model: nn.Module, schemes: Mapping[str, Scheme], kind: Kind = "exact") -> dict[str, WeightNoise]:
    """Let the named weights of a model be noised, in place; until masks are drawn nothing changes.

    Args:
        model: The model.
        schemes: Full parameter name -> scheme, as `resolve` returns it.
        kind: See `WeightNoise`.

    Returns:
        The noise of every weight: parameter name -> `WeightNoise`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
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
            del module.__dict__[_NOISES], module.__dict__[_OPENS]
            retype(module, type(module).__bases__[1])


def _swap(module: nn.Module, noises: dict[str, WeightNoise], opens: Iterable[WeightNoise]) -> None:
    base = type(module)
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__, **readers(base, noises, _read)}
    module.__dict__[_NOISES], module.__dict__[_OPENS] = noises, tuple(opens)
    retype(module, type(f"Noisy{base.__name__}", (NoisyLayer, base), namespace))


def _read(module: nn.Module, name: str) -> Any:
    weight = stored(module, name)
    noise = module.__dict__[_NOISES][name]
    if noise.active and module.training and (noise.window or _is_recomputing()):
        return noise.apply(weight)
    return weight


def _is_recomputing() -> bool:
    """Whether a backward pass is running: it reads weights only to repeat a forward (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1
