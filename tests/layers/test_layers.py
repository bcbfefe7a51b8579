"""Packed layers against the same module holding the decoded weights as plain Parameters."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_qnoise import PQ, Int, dequantize, quantize
from lightning_qnoise.convert import dense_state_dict
from lightning_qnoise.layers import PackedLayer, packed_weights
from lightning_qnoise.layers.linear import PackedLinear

SCHEMES = [Int(4), PQ(2, 4)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=["int4", "pq"])


class Reader(nn.Module):
    """A user's own layer that reads its weight itself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return self.scale * (x @ self.weight.T).relu()


class Conv1D(nn.Module):
    """As in transformers: weight `[in, out]`."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class WithAdapter(nn.Linear):
    """Keeps the forward of Linear and has one more weight."""

    def __init__(self):
        super().__init__(8, 6)
        self.adapter_weight = nn.Parameter(torch.randn(4, 4))


class Attention(nn.Module):
    def __init__(self, need_weights=True, **options):
        super().__init__()
        self.inner, self.need_weights = nn.MultiheadAttention(8, 2, batch_first=True, **options), need_weights

    def forward(self, query):
        k, v = self.inner.kdim, self.inner.vdim
        return self.inner(query, query[..., :k], query[..., :v], need_weights=self.need_weights)


class Recurrent(nn.Module):
    def __init__(self, cls, **options):
        super().__init__()
        self.inner = cls(8, 6, batch_first=True, **options)

    def forward(self, x):
        output, state = self.inner(x)
        return (output, *state) if isinstance(state, tuple) else (output, state)


ids = torch.tensor([[0, 1, 9], [3, 3, 2]])
x3 = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
CASES = {
    "linear": (lambda: nn.Linear(8, 6), x3),
    "linear-no-bias": (lambda: nn.Linear(8, 6, bias=False), x3[0]),
    "linear-no-rows": (lambda: nn.Linear(8, 6), torch.empty(0, 8)),
    "linear-subclass": (lambda: Doubled(8, 6), x3),
    "conv1d": (lambda: nn.Conv1d(4, 6, 4, dilation=2), torch.randn(2, 4, 16)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2, padding=1), torch.randn(2, 4, 9, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, (3, 2), groups=2, stride=2), torch.randn(2, 4, 9, 9)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, (1, 2), groups=4), torch.randn(2, 4, 9, 9)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 6, 2, padding=2, padding_mode="circular"), torch.randn(2, 4, 9, 9)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 2, padding=2, padding_mode="reflect"), torch.randn(2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), torch.randn(1, 2, 4, 4, 4)),
    "conv-transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 2), torch.randn(2, 4, 9)),
    "conv-transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), torch.randn(2, 4, 9, 9)),
    "embedding": (lambda: nn.Embedding(10, 8), ids),
    "embedding-padding": (lambda: nn.Embedding(10, 8, padding_idx=0), ids),
    "embedding-no-rows": (lambda: nn.Embedding(10, 8), torch.empty(0, 3, dtype=torch.long)),
    "embedding-int32": (lambda: nn.Embedding(10, 8), ids.int()),
    "embedding-bag": (lambda: nn.EmbeddingBag(10, 8, mode="mean"), ids),
    "attention": (Attention, x3),
    "attention-no-weights": (lambda: Attention(need_weights=False), x3),
    "attention-kdim": (lambda: Attention(kdim=4, vdim=6), x3),
    "attention-extras": (lambda: Attention(add_bias_kv=True, add_zero_attn=True, bias=False), x3),
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), x3),
    "decoder-layer": (lambda: Both(nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True)), x3),
    "lstm": (lambda: Recurrent(nn.LSTM), x3),
    "lstm-2-bi": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), x3),
    "lstm-no-bias": (lambda: Recurrent(nn.LSTM, bias=False), x3),
    "gru-2-bi": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True, bias=False), x3),
    "lstm-cell": (lambda: nn.LSTMCell(8, 6), x3[0]),
    "own-reader": (Reader, x3),
    "transformers-conv1d": (lambda: Conv1D(6, 8), x3),
    "bilinear": (lambda: Both(nn.Bilinear(8, 8, 4)), x3),
    "adapter": (WithAdapter, x3),
}
each_case = pytest.mark.parametrize("case", CASES)


class Both(nn.Module):
    """Gives the same input twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


def build(case, scheme):
    """A packed module, the dense reference and an input."""
    make, x = CASES[case]
    dense = make()
    packed = quantize(copy.deepcopy(dense), {"*": scheme})
    assert list(packed_weights(packed))
    with torch.no_grad():
        for name, weight in packed_weights(packed):
            parameter = dense.get_parameter(name)
            assert not torch.equal(parameter, weight.decode())  # what is compared below did change
            parameter.copy_(weight.decode())
    return packed, dense, x


def flat(output):
    return [output] if isinstance(output, torch.Tensor) else [t for t in output if t is not None]


def assert_same(packed, dense, x, **tolerance):
    for a, b in zip(flat(packed(x)), flat(dense(x)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@each_scheme
@each_case
def test_forward_equals_the_dense_reference(case, scheme):
    packed, dense, x = build(case, scheme)
    assert_same(packed, dense, x)
    packed.eval(), dense.eval()
    with torch.no_grad():  # the fast path of attention
        assert_same(packed, dense, x)
    with torch.inference_mode():
        assert_same(packed, dense, x)


@each_scheme
@pytest.mark.parametrize("case", ["linear", "linear-no-rows", "embedding", "attention", "lstm", "own-reader"])
def test_bfloat16(case, scheme):
    packed, dense, x = build(case, scheme)
    x = x.bfloat16() if x.is_floating_point() else x
    assert_same(packed.bfloat16(), dense.bfloat16(), x)
    assert all(t.dtype == torch.bfloat16 for t in flat(packed(x)))


@each_case
def test_copies_and_pickles(case):
    packed, _, x = build(case, Int(4))
    expected = flat(packed(x))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False), copy.deepcopy(copy.deepcopy(packed))):
        assert type(other) is type(packed) and other is not packed
        assert list(other.state_dict()) == list(packed.state_dict())
        for a, b in zip(flat(other(x)), expected, strict=True):
            assert torch.equal(a, b)
        for (_, a), (_, b) in zip(packed_weights(other), packed_weights(packed), strict=True):
            assert a is not b
        dequantize(other)
    assert len(list(packed_weights(packed))) > 0  # copies are independent


@each_case
def test_dequantize_restores_names_order_classes_and_values(case):
    packed, dense, x = build(case, Int(4))
    kept = {id(p) for p in packed.parameters()}
    state = dense_state_dict(packed)
    assert list(state) == list(dense.state_dict())
    assert all(torch.equal(state[k], v) for k, v in dense.state_dict().items())
    assert dequantize(packed) is packed
    assert [type(m) for m in packed.modules()] == [type(m) for m in dense.modules()]
    assert [k for k, _ in packed.named_parameters()] == [k for k, _ in dense.named_parameters()]
    assert list(packed.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), dense.parameters(), strict=True))
    assert kept <= {id(p) for p in packed.parameters()}
    assert_same(packed, dense, x, rtol=0, atol=0)


@each_case
def test_a_float_checkpoint_loads_into_the_packed_module(case):
    packed, _, x = build(case, Int(4))
    other = CASES[case][0]()
    packed.load_state_dict(other.state_dict())
    quantize(other, {"*": Int(4)})
    assert_same(packed, other, x, rtol=0, atol=0)
    packed.load_state_dict(build(case, Int(4))[0].state_dict())  # and so does a packed one


@each_case
def test_repr_names_the_scheme(case):
    packed, _, _ = build(case, Int(4))
    assert "IntWeight(Int(bits=4, granularity='channel'), shape=[" in repr(packed)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_keep_no_dense_copy(bidirectional):
    packed = quantize(nn.LSTM(64, 64, bidirectional=bidirectional), "int4")
    packed(torch.randn(3, 2, 64))
    file = io.BytesIO()
    torch.save(packed, file)
    stored = sum(t.nbytes for t in packed.state_dict().values())
    assert len(file.getvalue()) < stored + 20_000 < 2 * 64 * 256 * 4
    packed.float()  # _apply rebuilds the list of weights
    assert "_flat_weights" not in packed.__dict__


def test_recurrent_layer_trains_again_after_dequantize():
    lstm = dequantize(quantize(nn.LSTM(8, 8), "int4"))
    lstm(torch.randn(3, 2, 8))[0].sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())
    before = lstm(torch.ones(3, 2, 8))[0]
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(2)
    assert not torch.equal(lstm(torch.ones(3, 2, 8))[0], before)


def test_state_dict_keys():
    model = quantize(nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8)), {"0": Int(4), "1": PQ(2, 8)})
    assert list(model.state_dict()) == [
        *("0.bias", "0.weight.codes", "0.weight.scale", "0.weight.zero_point"),
        *("1.weight.codes", "1.weight.codebook"),
    ]
    symmetric = quantize(nn.Linear(8, 8, bias=False), {"*": Int(4, symmetric=True)})
    assert list(symmetric.state_dict()) == ["weight.codes", "weight.scale"]


def test_another_weight_of_a_linear_layer_leaves_its_product_alone():
    layer, x = WithAdapter(), torch.randn(2, 8)
    expected = layer(x)
    quantize(layer, {"adapter_weight": Int(4)})
    assert torch.equal(layer(x), expected) and not isinstance(layer, PackedLinear)
    quantize(layer, {"weight": Int(4)})
    assert isinstance(layer, PackedLinear) and not torch.equal(layer(x), expected)


def test_object_hooks_and_class_survive():
    calls, layer = [], nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, args, output: calls.append(module))
    model = nn.Sequential(layer)
    assert quantize(model, "int4") is model
    model(torch.randn(2, 8))
    assert model[0] is layer and calls == [layer]
    assert isinstance(layer, nn.Linear) and isinstance(layer, PackedLinear) and isinstance(layer, PackedLayer)
    dequantize(model)
    model(torch.randn(2, 8))
    assert type(layer) is nn.Linear and calls == [layer, layer]


@each_scheme
def test_padding_row_is_exactly_zero(scheme):
    table = quantize(nn.Embedding(20, 8, padding_idx=3), {"*": scheme})
    assert not table(torch.tensor([3, 3])).any() and table(torch.tensor([4])).any()


def test_linear_asks_the_packed_weight_for_the_product(monkeypatch):
    """A scheme with a kernel never decodes; a subclass with a forward of its own does."""
    linear, doubled = quantize(nn.Linear(8, 8), "int4"), quantize(Doubled(8, 8), "int4")
    monkeypatch.setattr(type(linear.packed("weight")), "linear", lambda self, x, bias: "kernel")
    assert linear(torch.randn(2, 8)) == "kernel"
    assert doubled(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_shape_is_an_error(strict):
    packed = quantize(nn.Sequential(nn.Linear(8, 8)), "int4")
    before = {k: v.clone() for k, v in packed.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight: \[8, 16\] in the checkpoint, \[8, 8\]"):
        packed.load_state_dict({"0.weight": torch.randn(8, 16), "0.bias": before["0.bias"]}, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in packed.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight\.codes"):
        packed.load_state_dict({"0.bias": before["0.bias"]})
