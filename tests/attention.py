"""Attention in formulas, and cases for it."""

import math

import torch
from torch import nn

N, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 16, 4


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(module, kind, batched=True):
    """Query, key and value: of one tensor, of two (the keys are the values, or the queries), or of three."""
    shapes = [(QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim)]
    if batched:
        shapes = [(N, n, width) if module.batch_first else (n, N, width) for n, width in shapes]
    query, key, value = (torch.randn(shape) for shape in shapes)
    return {
        "self": (query, query, query),
        "memory": (query, key, key),
        "values": (query, query, query + 1),
        "three": (query, key, value),
    }[kind]


def on_grid(x, scale, zero_point, bits=8):
    codes = ((x.float() / scale).round().double() + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * scale.double()


def per_token(x):
    """Every vector on the integers of its own min-max range, float64."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    return on_grid(x, scale, (-low / scale).round())


def formula(query, key, value, weights, biases, enter):
    """softmax(q k / sqrt(d)) v in float64, batch first; `enter[name]` quantizes what a projection multiplies."""
    parts = zip("qkv", (query, key, value), weights[:3], biases[:3], strict=True)
    q, k, v = (enter[name](x) @ w.double().T + b.double() for name, x, w, b in parts)
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    y = ((q @ k.mT) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
    y = y.transpose(1, 2).flatten(2).float()
    return enter["out"](y) @ weights[3].double().T + biases[3].double()


def parts_of(module):
    """The decoded weights and the biases of the four projections."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    return [*weights, module.out_proj.weight], [*module.in_proj_bias.chunk(3), module.out_proj.bias]
