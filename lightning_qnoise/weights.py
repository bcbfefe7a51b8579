"""The weights of a model as plain data: names, layer classes, shape, and what stands in the way of compressing one."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qnoise.layers import input_names
from lightning_qnoise.schemes import PackedWeight
from lightning_qnoise.sharding import is_cut_in_rows

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ATTENTION = {"MultiheadAttention", "NonDynamicallyQuantizableLinear"}  # the latter is its out_proj
_TABLES = {"Embedding", "EmbeddingBag"}
_NORMS = {"_NormBase", "LayerNorm", "GroupNorm", "RMSNorm"}


@dataclass(frozen=True)
class Weight:
    """One tensor of parameters.

    Attributes:
        names: Every full parameter name of it; a tied one has several. The first is its name in files and tables.
        kinds: Class names of the layers that own it, base classes included.
        shape: Its shape (empty where it is not initialized yet).
        dtype: Its dtype.
        obstacle: Why it cannot be compressed, if so.
        takes_input: Whether what enters its layer can be quantized.
    """

    names: tuple[str, ...]
    kinds: frozenset[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    obstacle: str | None = None
    takes_input: bool = True

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Full names of the modules that own it; for a parametrized weight, of those that read it."""
        return tuple(_read_as(name).rpartition(".")[0] for name in self.names)

    @property
    def nbytes(self) -> int:
        """Bytes of the float tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_attention(self) -> bool:
        """Whether it belongs to an attention layer, by class or by name."""
        names = [name.lower() for name in self.names]
        named = any("attn" in name or "attention" in name for name in names)
        return named or bool(self.kinds & _ATTENTION)

    @property
    def is_embedding(self) -> bool:
        """Whether it is nothing but a table, into which ids go."""
        return bool(self.kinds & _TABLES) and not self.takes_input

    @property
    def is_layer_weight(self) -> bool:
        """Whether it is the weight matrix of a layer, not a norm, a bias or a Parameter of the user's own."""
        attributes = [_read_as(name).rpartition(".")[2] for name in self.names]
        return len(self.shape) >= 2 and not self.kinds & _NORMS and any("weight" in a for a in attributes)


def _read_as(name: str) -> str:
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name)


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield `(full name, module, attribute, parameter)` for every name of every Parameter, in the model's order.

    A codebook that is trained (`train_codebooks`) is none of the model's own.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedWeight):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, module, attribute, parameter


def list_weights(model: nn.Module) -> list[Weight]:
    """Return the weights of a model in the order of its parameters, each once."""
    found: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    for entry in owners(model):
        found.setdefault(id(entry[3]), []).append(entry)
    takers = input_names(model)
    return [_weight(entries, takers) for entries in found.values()]


def _weight(
    entries: list[tuple[str, nn.Module, str, nn.Parameter]], takers: Container[tuple[nn.Module, str]]
) -> Weight:
    parameter = entries[0][3]
    lazy = is_lazy(parameter)
    return Weight(
        names=tuple(name for name, *_ in entries),
        kinds=frozenset(cls.__name__ for _, module, *_ in entries for cls in type(module).__mro__),
        shape=() if lazy else tuple(parameter.shape),
        dtype=parameter.dtype,
        obstacle="is not initialized yet: run one batch through the model first"
        if lazy
        else next(filter(None, (_obstacle(module, parameter) for _, module, _, parameter in entries)), None),
        takes_input=any((module, attribute) in takers for _, module, attribute, _ in entries),
    )


def _obstacle(module: nn.Module, parameter: Tensor) -> str | None:
    if parameter.dtype not in FLOATS:
        return f"has dtype {parameter.dtype}, not a float of 16 bits or more"
    if not parameter.numel():
        return "holds no elements"
    if not is_cut_in_rows(parameter):
        return "is sharded otherwise than in whole rows (FSDP), which is not supported"
    if type(module).__name__ == "ParametrizationList":
        return "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return "belongs to a container, which would take its packed form for one more layer"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "is rewritten in every forward by max_norm: set max_norm=None"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils"):
            return f"is recomputed in every forward by {type(hook).__name__}: make that permanent first"
    return None
