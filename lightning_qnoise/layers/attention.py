"""Packed attention, which calls its projections."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_qnoise.layers.attend import attend
from lightning_qnoise.layers.base import PackedLayer, forward_of, packed_names, packs, set_packed
from lightning_qnoise.layers.swap import has_own_forward

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
    forward = attend

    @classmethod
    def serves(cls, names: Collection[str]) -> bool:
        """Any of its projections can be packed, `out_proj` alone, too."""
        return True


def input_names(model: nn.Module) -> dict[tuple[nn.Module, str], tuple[str, ...]]:
    """Return what can be quantized on its way into a layer: (layer, parameter) -> arguments of its forward.

    Left out are layers whose `forward` was set on the object, and the `out_proj` of an attention with a forward of the
    user's own: nobody may call it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
        >>> input_names(model) == {(model[0], "weight"): ("input",)}
        True
    """
    called = {module.out_proj for module in _attentions(model)}
    found = {}
    for module in model.modules():
        is_read_only = isinstance(module, NonDynamicallyQuantizableLinear) and module not in called
        if not is_read_only and not has_own_forward(module):
            found.update({(module, parameter): names for parameter, names in forward_of(module).inputs.items()})
    return found


@contextmanager
def calling_projections(model: nn.Module) -> Iterator[None]:
    """Let attention call its `out_proj`, which torch's own reads, so that hooks see what enters it."""
    attentions = _attentions(model)
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
    """Those with torch's forward."""
    return [m for m in model.modules() if forward_of(m) is PackedAttention and not has_own_forward(m)]
