"""Packed attention: torch's own, which reads the decoded projections, on inputs laid out for a fast product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_qnoise.layers.base import PackedLayer, packs


@packs(nn.MultiheadAttention)
class PackedAttention(PackedLayer):
    """`nn.MultiheadAttention` whose input projection is packed.

    Outside of its fused kernel, which a quantized input of a neighbour rules out, torch swaps batch and positions. A
    weight without a gradient is then multiplied by position after position, which can take three times as long as
    one product.
    """

    parameter = "in_proj_weight"
    batch_first: bool

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the attention returns."""
        if self.batch_first and query.ndim == 3 and not query.is_nested:
            is_self, is_one = key is query, value is key  # torch asks the same
            query = _positions_first(query)
            key = query if is_self else _positions_first(key)
            value = key if is_one else _positions_first(value)
        return super().forward(query, key, value, *args, **kwargs)


def _positions_first(x: Tensor) -> Tensor:
    """`[batch, positions, width]` of the same numbers, in memory `[positions, batch, width]`."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
