"""Attention with packed weights alone is torch's own with the decoded ones, fused or not."""

import copy

import pytest
import torch
from torch import nn

from lightning_qnoise import Int, quantize
from lightning_qnoise.layers import PackedAttention

N, LENGTH, WIDTH = 3, 5, 16


def packed(**options):
    """A packed attention, and a plain one that has its decoded weights."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, 4, **{"batch_first": True, **options}).eval()
    for parameter in plain.parameters():  # the biases begin as zeros
        nn.init.normal_(parameter, std=0.3)
    model = nn.ModuleList([copy.deepcopy(plain)])
    quantize(model, Int(8))
    with torch.no_grad():
        plain.in_proj_weight.copy_(model[0].in_proj_weight)
        plain.out_proj.weight.copy_(model[0].out_proj.weight)
    assert isinstance(model[0], PackedAttention)
    return model[0], plain


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])  # without gradients torch has a fused kernel
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("n", [0, 1, N])
def test_self_attention(n, batch_first, need_weights, grad):
    attention, plain = packed(batch_first=batch_first)
    x = torch.randn((n, LENGTH, WIDTH) if batch_first else (LENGTH, n, WIDTH))
    with torch.set_grad_enabled(grad):
        found, expected = (module(x, x, x, need_weights=need_weights) for module in (attention, plain))
    same(found if n else found[:1], expected if n else expected[:1])  # torch's kernel has no weights of no sequences


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_options_and_masks(options):
    attention, plain = packed(**options)
    query, key, value = torch.randn(N, LENGTH, WIDTH), torch.randn(N, 7, WIDTH), torch.randn(N, 7, WIDTH)
    padding = torch.zeros(N, 7).masked_fill(torch.arange(7) >= torch.tensor([[7], [3], [5]]), -torch.inf)
    mask = torch.randn(LENGTH, 7)
    for k, v in ((key, value), (key, key)):
        same(attention(query, k, v), plain(query, k, v))
        same(
            attention(query, k, v, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False),
            plain(query, k, v, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False),
        )
    same(attention(key, value, key), plain(key, value, key))
    same(attention(query[0], key[0], value[0]), plain(query[0], key[0], value[0]))


def test_gradients():
    attention, plain = packed()
    inputs = [torch.randn(N, LENGTH, WIDTH, requires_grad=True) for _ in range(2)]
    for x, module in zip(inputs, (attention, plain), strict=True):
        x.data.copy_(inputs[0])
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention.in_proj_bias.grad, plain.in_proj_bias.grad, rtol=1e-4, atol=1e-5)


def test_every_position_at_once(monkeypatch):
    """A product of a matrix that is contiguous is one product; of another one, torch makes one for each position."""
    attention, plain = packed()
    x, mask, linear = torch.randn(N, LENGTH, WIDTH), torch.zeros(LENGTH, LENGTH), nn.functional.linear
    seen = []
    monkeypatch.setattr(nn.functional, "linear", lambda x, *args: (seen.append(x), linear(x, *args))[1])
    for module in (attention, plain):
        module(x, x, x, attn_mask=mask, need_weights=False)
    assert [part.is_contiguous() for part in seen] == [True, True, False, True]


@pytest.mark.parametrize(("batch_first", "shape"), [(False, (LENGTH, N, WIDTH)), (True, (LENGTH, WIDTH))])
def test_what_is_laid_out_already_is_not_copied(monkeypatch, batch_first, shape):
    attention, _ = packed(batch_first=batch_first)
    x, mask, linear = torch.randn(shape), torch.zeros(LENGTH, LENGTH), nn.functional.linear
    seen = []
    monkeypatch.setattr(nn.functional, "linear", lambda x, *args: (seen.append(x), linear(x, *args))[1])
    attention(x, x, x, attn_mask=mask, need_weights=False)
    assert seen[0].data_ptr() == x.data_ptr()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_inputs():
    attention, plain = packed()
    x = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])
    with torch.no_grad():
        actual, expected = (module(x, x, x, need_weights=False)[0].to_padded_tensor(0) for module in (attention, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiles_without_a_break():
    attention, plain = packed()
    x = torch.randn(N, LENGTH, WIDTH)
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        same(compiled(x, x, x, attn_mask=torch.zeros(LENGTH, LENGTH)), plain(x, x, x))
