"""Packed attention, which calls its projections."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lightning_qnoise.layers.attend import attend
from lightning_qnoise.layers.base import PackedLayer, forward_of, packed_names, packs, set_packed
from lightning_qnoise.layers.swap import own_class

_PROJECTIONS = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}


@packs(nn.MultiheadAttention)
class PackedAttention(PackedLayer):
    """`nn.MultiheadAttention` with a packed projection, which multiplies what enters it as a packed Linear does."""

    inputs = _PROJECTIONS

    @classmethod
    def serves(cls, names: Collection[str]) -> bool:
        """Any of its projections can be packed, `out_proj` alone, too."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the attention returns."""
        return attend(cast(nn.MultiheadAttention, self), *args, **kwargs)


def input_names(model: nn.Module) -> dict[tuple[nn.Module, str], tuple[str, ...]]:
    """Return what can be quantized on its way into a layer: (layer, parameter) -> arguments of its forward.

    The `out_proj` of an attention with a forward of the user's own is left out: nobody may call it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
        >>> input_names(model) == {(model[0], "weight"): ("input",)}
        True
    """
    called = {module.out_proj for module in _attentions(model)}
    found = {}
    for module in model.modules():
        if own_class(module).__name__ != "NonDynamicallyQuantizableLinear" or module in called:
            found.update({(module, parameter): names for parameter, names in forward_of(module).inputs.items()})
    return found


@contextmanager
def calling_projections(model: nn.Module) -> Iterator[None]:
    """Let attention call its `out_proj`, which torch's own reads, so that hooks see what enters it."""
    attentions = [module for module in _attentions(model) if "forward" not in module.__dict__]
    for module in attentions:
        module.__dict__["forward"] = partial(attend, cast(nn.MultiheadAttention, module))
    try:
        yield
    finally:
        for module in attentions:
            del module.__dict__["forward"]


def settle_attention(model: nn.Module) -> None:
    """Make every attention a packed layer whose `out_proj` is one, also where nothing else of it is packed."""
    for module in _attentions(model):
        if not packed_names(module):
            set_packed(module, isinstance(module.out_proj, PackedLayer))


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if forward_of(module) is PackedAttention]
