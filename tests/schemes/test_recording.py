"""Forwards under compilers, tracers, modes and vmap, which see no numbers, against the plain forward."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lightning_qnoise import Int, quantize, set_memory

LAYERS = {
    "convolution": (lambda: nn.Conv2d(8, 16, 3, padding=1), (4, 8, 6, 6)),
    "Linear": (lambda: nn.Linear(8, 16), (4, 8)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_activation = pytest.mark.parametrize("activation", [Int(8), Int(8, per="tensor")], ids=["token", "tensor"])
each_mode = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no grad"])


def packed(name, activation, memory="lean"):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return set_memory(quantize(nn.Sequential(make()), Int(8, activation=activation)), memory), torch.randn(shape).relu()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_layer
@each_activation
@each_mode
def test_vmap(name, activation, mode):
    model, x = packed(name, activation)
    samples = torch.stack([x, 2 * x - 1])
    with mode():
        expected = torch.stack([model(sample) for sample in samples])
        torch.testing.assert_close(torch.vmap(model)(samples), expected, rtol=1e-4, atol=1e-5)


@each_layer
@each_activation
@each_mode
def test_a_traced_graph_has_no_numbers_of_its_example(name, activation, mode):
    model, x = packed(name, activation)
    with mode():
        graph = make_fx(model)(x)
        for other in (x, 3 * x - 1):
            torch.testing.assert_close(graph(other), model(other), rtol=1e-4, atol=1e-5)


@each_layer
@each_activation
@each_mode
def test_fake_tensors(name, activation, mode):
    model, x = packed(name, activation)
    with mode(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model(fake.from_tensor(x)).shape == (len(x), 16, *x.shape[2:])


@torch.no_grad()
@pytest.mark.parametrize("args", [(1, 32, 3, 1), (1, 32, 3, 2), (16, 32, 1, 1), (16, 32, 1, 2)], ids=str)
def test_torch_counts_the_operations_of_small_convolutions(args):
    layer = nn.Conv2d(*args)
    model, x = set_memory(quantize(nn.Sequential(layer), Int(8)), "fast"), torch.randn(4, args[0], 8, 8)
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() == 2 * y.numel() * layer.weight[0].numel()
