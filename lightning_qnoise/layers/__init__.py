"""How a layer holds a packed weight: scheme-agnostic, for every module by a property, for some with a forward."""

from lightning_qnoise.layers.attention import PackedAttention
from lightning_qnoise.layers.base import (
    PackedLayer,
    pack_layer,
    packed_names,
    packed_weights,
    packs,
    quantizes_input,
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
    "pack_layer",
    "packed_names",
    "packed_weights",
    "packs",
    "quantizes_input",
    "unpack_layer",
]
