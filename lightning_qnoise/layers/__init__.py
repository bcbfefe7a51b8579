"""How a layer holds a packed weight: scheme-agnostic, for every module by a property, for some with a forward."""

from lightning_qnoise.layers.arguments import on_rows
from lightning_qnoise.layers.attend import attend
from lightning_qnoise.layers.attention import PackedAttention, calling_projections, input_names, settle_attention
from lightning_qnoise.layers.base import (
    PackedLayer,
    forward_of,
    pack_layer,
    packed_names,
    packed_weights,
    packs,
    unpack_layer,
)
from lightning_qnoise.layers.conv import PackedConv
from lightning_qnoise.layers.embedding import PackedEmbedding
from lightning_qnoise.layers.linear import PackedLinear

__all__ = [
    "PackedAttention",
    "PackedConv",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "attend",
    "calling_projections",
    "forward_of",
    "input_names",
    "on_rows",
    "pack_layer",
    "packed_names",
    "packed_weights",
    "packs",
    "settle_attention",
    "unpack_layer",
]
