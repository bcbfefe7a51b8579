"""Noise under torch.compile: one graph for all masks, and the eager results."""

import pytest
import torch
from models import Attention, TiedByName, TiedByRead, draw, gradients, mlp, noisy, small_pq

from lightning_qnoise import Int
from lightning_qnoise.attach import attach, attach_inputs
from lightning_qnoise.input_noise import InputNoises
from lightning_qnoise.policy import resolve

X = torch.linspace(-1, 1, 4 * 16).view(4, 16)


class Graphs:
    """A compile backend that counts its calls."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("policy", ["pq", "int8"])
@pytest.mark.parametrize("make", [mlp, Attention, TiedByName, TiedByRead])
def test_compile_takes_the_whole_graph_once_for_all_masks(make, policy, graphs):
    model = make()
    x = torch.arange(20).view(4, 5) if "Tied" in type(model).__name__ else X.view(1, 4, 16)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    plain = compiled(x)
    assert graphs.count == 1
    noises = attach(model, resolve(model, small_pq(model) if policy == "pq" else policy))  # after a compiled call
    seen = []
    for step in range(6):
        draw(model, noises, rate=0.3 + 0.1 * step, seed=step)
        out = compiled(x)
        assert not torch.equal(out, plain)
        torch.testing.assert_close(out, model(x))
        out.sum().backward()
        seen.append(graphs.count)
    assert seen == [2] * 6
    for name, noise in noises.items():  # what a new epoch does
        noise.target = noise.encode(model.get_parameter(name))
    draw(model, noises, seed=7)
    torch.testing.assert_close(compiled(x), model(x))
    assert graphs.count <= 3
    for name, noise in noises.items():
        noise.target = noise.encode(model.get_parameter(name))
    draw(model, noises, seed=8)
    torch.testing.assert_close(compiled(x), model(x))
    assert graphs.count <= 3, "every epoch compiles again"
    draw(model, noises, rate=0.0)
    torch.testing.assert_close(compiled(x), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_gradients_equal_the_eager_ones():
    torch._dynamo.reset()
    model = mlp()
    noisy(model, rate=0.7)
    expected = gradients(model, lambda: model(X))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(model, lambda: compiled(X)), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("activation", [Int(4), Int(4, mode="static"), Int(4, mode="static", range="mse")])
@pytest.mark.parametrize("make", [mlp, Attention])
def test_noise_on_inputs_takes_the_whole_graph(make, activation, graphs):
    model = make()
    schemes = resolve(model, Int(8, activation=activation))
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    x = X if make is mlp else X.view(1, 4, 16)
    plain = compiled(x)
    ours, eager = InputNoises(schemes, shapes), InputNoises(schemes, shapes)
    seen = []
    for step in range(6):
        outputs = []
        for noises, run in ((ours, compiled), (eager, model)):
            attach_inputs(model, noises.of)
            noises.draw(0.3 + 0.1 * step, torch.Generator().manual_seed(step))
            outputs.append(run(x * (1 + step)))
        torch.testing.assert_close(*outputs)
        assert not torch.equal(outputs[0], plain)
        seen.append(graphs.count)
    assert seen[-1] == seen[2] <= 3  # one for the noise, and one for a running range that is there
    if activation.mode == "static":
        for name, noise in ours.of.items():
            torch.testing.assert_close(noise.ends, eager.of[name].ends)
