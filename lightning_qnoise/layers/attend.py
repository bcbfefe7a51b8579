"""Attention that calls its projections, where torch's own reads their weights: what enters each can be quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qnoise.layers.arguments import once
from lightning_qnoise.layers.swap import own_class
from lightning_qnoise.schemes import PackedWeight


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what `nn.MultiheadAttention` returns, of the same arguments.

    Packed projections multiply what enters them, `out_proj` is called.

    Raises:
        ValueError: Inputs or a mask do not fit, or `is_causal` comes without a mask.

    Example:
        >>> attention, x = nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)
        >>> torch.allclose(attend(attention, x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
        True
    """
    rest = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
    if query.is_nested:
        return _attend_nested(module, query, key, value, *rest)
    _check(query, key, value, at=0 if module.batch_first else 1)
    if query.ndim == 2:
        return _attend_one(module, query, key, value, *rest)
    y, weights = _mix(module, _projections(module, query, key, value), *rest)
    return _output(module.out_proj, y), weights


def _mix(
    module: nn.MultiheadAttention,
    projected: tuple[Tensor, ...],
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """What enters `out_proj`, and the weights, from query, key and value as they left their projections."""
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which is missing: pass the causal mask, too")
    q, k, v = (_heads(x, module) for x in _with_extra(module, *projected))
    is_causal = is_causal and key_padding_mask is None and not need_weights
    n_keys = projected[1].shape[1 if module.batch_first else 0]
    mask = None if is_causal else _mask(attn_mask, key_padding_mask, q, n_keys, k.shape[2] - n_keys)
    rate = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), rate)
        y = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal)
    return (y.transpose(1, 2) if module.batch_first else y.permute(2, 0, 1, 3)).flatten(2), weights


def _check(query: Tensor, key: Tensor, value: Tensor, at: int) -> None:
    """Refuse what torch's own refuses; `at` is the dimension of the batch."""
    is_right = query.ndim in (2, 3) and query.ndim == key.ndim == value.ndim and key.shape[:-1] == value.shape[:-1]
    if not is_right or (query.ndim == 3 and query.shape[at] != key.shape[at]):
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"query, key and value must have 2 or 3 dimensions, and those of one batch, got {shapes}")


def _attend_one(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """Of one sequence without a dimension for it."""
    at = 0 if module.batch_first else 1
    query, key, value = once(lambda x: x.unsqueeze(at), query, key, value)
    y, weights = attend(module, query, key, value, None if padding is None else padding[None], *rest)
    return y.squeeze(at), None if weights is None else weights.squeeze(0)


def _attend_nested(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """Of sequences of several lengths: between the projections they are padded, and masked."""
    is_self = query is key and key is value
    if not is_self or not module.batch_first or padding is not None or query.layout is not torch.strided:
        raise ValueError(
            "nested tensors of the strided layout are for self-attention with batch_first=True and without "
            "key_padding_mask; pad others: x.to_padded_tensor(0.0)"
        )
    parts = query.unbind()
    lengths = [len(part) for part in parts]
    rows = _product(module, "in_proj_weight", torch.cat(parts), module.in_proj_bias)
    padded = torch.nested.as_nested_tensor(list(rows.split(lengths))).to_padded_tensor(0.0)
    places = torch.arange(padded.shape[1], device=padded.device)
    padding = places >= torch.tensor(lengths, device=padded.device)[:, None]
    y, weights = _mix(module, padded.chunk(3, dim=-1), padding, *rest)
    y = _output(module.out_proj, y[~padding])
    return torch.nested.as_nested_tensor(list(y.split(lengths))), weights


def _projections(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value as they meet, each in the layout of its input, `[..., embed_dim]`."""
    if query is key and key is value and module._qkv_same_embed_dim:
        return _product(module, "in_proj_weight", query, module.in_proj_bias).chunk(3, dim=-1)
    inputs = [query, key, value]
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    if not module._qkv_same_embed_dim:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(_product(module, *of_one) for of_one in zip(names, inputs, biases, strict=True))
    packed, weights = module._modules.get("in_proj_weight"), module.in_proj_weight.chunk(3)
    if isinstance(packed, PackedWeight):
        inputs = once(packed.quantize_input, *inputs)
    return tuple(F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True))


def _product(module: nn.Module, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    packed = module._modules.get(name)
    return packed.linear(x, bias) if isinstance(packed, PackedWeight) else F.linear(x, getattr(module, name), bias)


def _output(out_proj: nn.Module, y: Tensor) -> Tensor:
    """Call the projection, if it is what torch takes it for: a Linear."""
    if own_class(out_proj).forward is nn.Linear.forward:
        return out_proj(y)
    return F.linear(y, out_proj.weight, out_proj.bias)  # type: ignore[arg-type]


def _with_extra(module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append the positions that `add_bias_kv` and `add_zero_attn` ask for."""
    at, n = (1, q.shape[0]) if module.batch_first else (0, q.shape[1])
    shape = (n, 1, -1) if module.batch_first else (1, n, -1)
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (torch.cat([x, b.expand(shape)], at) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(()).expand(*shape[:2], x.shape[2])], at) for x in (k, v))
    return q, k, v


def _heads(x: Tensor, module: nn.MultiheadAttention) -> Tensor:
    """`[batch, heads, positions, head_dim]`."""
    x = x.unflatten(2, (module.num_heads, module.head_dim))
    return x.transpose(1, 2) if module.batch_first else x.permute(1, 2, 0, 3)


def _mask(mask: Tensor | None, padding: Tensor | None, q: Tensor, n_keys: int, n_extra: int) -> Tensor | None:
    """Both masks as what is added to scores, broadcast to `[batch, heads, queries, keys + extra]`."""
    n, heads, n_queries, _ = q.shape
    total = None
    if mask is not None:
        if mask.shape not in ((n_queries, n_keys), (n * heads, n_queries, n_keys)):
            shapes = f"[{n_queries}, {n_keys}] or [{n * heads}, {n_queries}, {n_keys}]"
            raise ValueError(f"attn_mask must have the shape {shapes}, got {list(mask.shape)}")
        total = _added(mask, q)
        total = total[None, None] if mask.ndim == 2 else total.unflatten(0, (n, heads))
    if padding is not None:
        if padding.shape != (n, n_keys):
            raise ValueError(f"key_padding_mask must have the shape [{n}, {n_keys}], got {list(padding.shape)}")
        added = _added(padding, q)[:, None, None, :]
        total = added if total is None else total + added
    return total if total is None or not n_extra else F.pad(total, (0, n_extra))


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(mask, -torch.inf)
