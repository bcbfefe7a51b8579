"""Packed convolutions against torch's own on the quantized input and the decoded weight."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_qnoise import PQ, Int, dequantize, quantize
from lightning_qnoise.layers import packed_weights

LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (3, 4, 7, 8)),
    "grouped": (lambda: nn.Conv2d(4, 8, (3, 2), groups=4, bias=False), (2, 4, 5, 6)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 5, 6)),
    "reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 9)),
    "3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 2, 2), (1, 4, 3, 3, 2)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
ACTIVATIONS = {None: None, "sample": Int(8), "tensor": Int(6, per="tensor"), "static": Int(8, mode="static")}


def reference(layer, packed, x, *args):
    """The user's own layer on what the packed one reads."""
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(packed.decode())
    return dense(packed.quantize_input(x), *args)


@each_layer
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scheme", [Int(4), PQ(2, 6, codebook=Int(8))], ids=["int", "pq"])
def test_it_is_the_own_convolution_of_quantized_parts(make, shape, activation, scheme):
    layer, x = make(), torch.randn(shape)
    scheme = type(scheme)(**{**vars(scheme), "activation": ACTIVATIONS[activation]})
    model = quantize(nn.Sequential(copy.deepcopy(layer)), {"*": scheme}, loader=[x])
    packed = model[0].packed("weight")
    assert type(model[0]).__name__ == f"Packed{type(layer).__name__}" and isinstance(model[0], type(layer))
    torch.testing.assert_close(model(x), reference(layer, packed, x))
    assert torch.equal(packed.quantize_input(x), x) == (activation is None)
    error = (model(x) - layer(x)).norm() / layer(x).norm()
    assert error < (0.2 if isinstance(scheme, Int) else 1.0)


@pytest.mark.parametrize("kind", ["transposed1d", "transposed2d", "transposed3d"])
@pytest.mark.parametrize("activation", [None, "static"])
def test_a_transposed_convolution_takes_an_output_size(kind, activation):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    size = layer(x).shape[2:]
    packed = quantize(nn.Sequential(copy.deepcopy(layer)), {"*": Int(8, activation=ACTIVATIONS[activation])}, [x])[0]
    expected = reference(layer, packed.packed("weight"), x)
    torch.testing.assert_close(packed(x, size), expected)
    torch.testing.assert_close(packed(x, output_size=size), expected)


@each_layer
def test_the_input_may_be_a_keyword(make, shape):
    model = quantize(nn.Sequential(make()), {"*": Int(8, activation=Int(8))})
    x = torch.randn(shape)
    assert torch.equal(model[0](input=x), model[0](x))


@each_layer
def test_the_gradient_reaches_bias_and_input_of_float_layers(make, shape):
    layer = make()
    model = quantize(nn.Sequential(layer), {"*": Int(8)})
    x = torch.randn(shape, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert [name for name, _ in model.named_parameters()] == ([] if layer.bias is None else ["0.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer, x = nn.Conv2d(4, 6, 3, padding=1).to(dtype), torch.randn(2, 4, 5, 5).to(dtype)
    model = quantize(nn.Sequential(copy.deepcopy(layer)), {"*": Int(8, activation=Int(8))})
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x), reference(layer, model[0].packed("weight"), x))
    assert quantize(nn.Sequential(nn.Conv2d(4, 6, 3)), "int8").to(dtype)(x).dtype == dtype


@each_layer
def test_copies_and_the_way_back(make, shape):
    x, model = torch.randn(shape), quantize(nn.Sequential(make()), {"*": Int(8, activation=Int(8))})
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    decoded = dict(packed_weights(model))["0.weight"].decode()
    kind = type(make())
    assert type(dequantize(model)[0]) is kind and torch.equal(model[0].weight, decoded)


def test_layouts_in_memory_and_empty_batches():
    layer = nn.Conv2d(4, 6, 3, padding=1)
    model = quantize(nn.Sequential(layer), {"*": Int(8, activation=Int(8))})
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))
    assert model(torch.empty(0, 4, 5, 5)).shape == (0, 6, 5, 5)


def test_a_subclass_with_its_own_forward_keeps_it_and_its_input_stays_float():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    layer, x = Standardized(4, 6, 3), torch.randn(2, 4, 5, 5)
    model = quantize(nn.Sequential(copy.deepcopy(layer)), {"*": Int(4)})
    torch.testing.assert_close(model(x), reference(layer, model[0].packed("weight"), x))
    with pytest.raises(ValueError, match=r"layer '0\.weight'.*activation=None"):
        quantize(nn.Sequential(layer), {"*": Int(4, activation=Int(8))})
