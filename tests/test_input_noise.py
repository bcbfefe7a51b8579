"""Noise on inputs against formulas written out here, alone and in models."""

import copy

import numpy as np
import pytest
import torch
from models import TiedByName, noisy_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qnoise import PQ, Int
from lightning_qnoise.attach import attach_inputs, detach
from lightning_qnoise.input_noise import InputNoise, InputNoises

STATIC = Int(4, mode="static")
ACTIVATIONS = {
    "token": Int(4),
    "tensor": Int(4, per="tensor", symmetric=True),
    "cut": Int(4, range="mse"),
    "static": STATIC,
    "static_mse": Int(4, mode="static", range="mse"),
}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def grid(values, bits=4, symmetric=False, ends=None):
    """Values on the integers of their min-max range (or of `ends`), and its ends, float64."""
    low, high = ends or (min(values.min().item(), 0), max(values.max().item(), 0))
    top = 2**bits - 1
    scale = max(high, -low) / ((top - 1) / 2) if symmetric else (high - low) / top
    zero = 2 ** (bits - 1) if symmetric else np.rint(-low / scale)
    codes = np.clip(np.rint(values.double().numpy() / scale) + zero, 0, top)
    return torch.from_numpy((codes - zero) * scale), ((0 - zero) * scale, (top - zero) * scale)


def drawn(activation, rate, shape=(5, 7), name="fc.weight", seed=0):
    noises = InputNoises({name: Int(8, activation=activation)}, {name: shape})
    noises.draw(rate, torch.Generator().manual_seed(seed))
    return noises.of[name]


def test_rate_one_quantizes_all_and_rate_zero_is_no_noise():
    x = torch.randn(6, 7)
    noise = drawn(Int(4), 1.0)
    assert noise.active
    expected = torch.stack([grid(row)[0] for row in x]).float()
    torch.testing.assert_close(noise.apply(x), expected, rtol=1e-5, atol=1e-6)
    model = nn.Linear(7, 5)
    attach_inputs(model, {"weight": noise})
    plain = copy.deepcopy(model)
    assert type(plain) is nn.Linear
    assert not torch.equal(model(x), plain(x))
    torch.testing.assert_close(model(x), plain(expected), rtol=1e-4, atol=1e-5)
    noise.draw(0.0, torch.zeros(10, dtype=torch.bool))
    assert not noise.active and torch.equal(model(x), plain(x))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_elements_are_quantized_at_the_rate(rate):
    x = torch.rand(100, 1000) + 0.5
    noise, exact = drawn(Int(2, per="tensor"), rate), drawn(Int(2, per="tensor"), 1.0)
    noisy, all_noisy = noise.apply(x), exact.apply(x)
    changed = noisy != x
    assert torch.equal(noisy[changed], all_noisy[changed])
    n = x.numel()
    assert abs(changed.sum().item() - n * rate) < 4 * (n * rate * (1 - rate)) ** 0.5
    columns = changed.float().mean(dim=0)  # no column is favoured
    assert (columns - rate).abs().max() < 6 * (rate * (1 - rate) / 100) ** 0.5


def test_masks_of_two_layers_and_of_two_draws_differ():
    schemes = {name: Int(8, activation=Int(4)) for name in ("a.weight", "b.weight")}
    noises = InputNoises(schemes | {"c": Int(8)}, dict.fromkeys([*schemes, "c"], (5, 50)))
    assert set(noises.of) == set(schemes)
    generator, x = torch.Generator().manual_seed(0), torch.rand(40, 50) + 1
    noises.draw(0.5, generator)
    first = [noises.of[name].apply(x) != x for name in schemes]
    noises.draw(0.5, generator)
    second = [noises.of[name].apply(x) != x for name in schemes]
    for one, other in ((first[0], first[1]), (first[0], second[0]), (second[0], second[1])):
        assert 0.4 < (one != other).float().mean() < 0.6
    noises.draw(0.5, torch.Generator().manual_seed(0))
    assert torch.equal(noises.of["a.weight"].apply(x) != x, first[0])  # the same seed, the same masks
    assert noises.of["a.weight"].active and noises.of["b.weight"].active
    noises.stop()
    assert not noises.of["a.weight"].active and not noises.of["b.weight"].active


def test_without_activations_nothing_is_drawn():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    InputNoises({"a": Int(8), "b": PQ(4, 8)}, {"a": (4, 4), "b": (4, 4)}).draw(0.5, generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("n", [2**18 - 1, 2**18, 2**18 + 1, 2**19 + 77])
def test_a_mask_smaller_than_the_input_repeats(n):
    noise = drawn(Int(2, per="tensor"), 0.5)
    x = torch.rand(n) + 0.5
    noisy = noise.apply(x[None])[0]
    assert torch.isfinite(noisy).all()
    changed = noisy != x
    assert abs(changed.float().mean().item() - 0.5) < 0.01
    tail = changed[2**18 :]
    differs = tail != changed[: 2**18].repeat(2)[: len(tail)]
    assert differs.sum() <= 2  # an element may lie on the grid


@each_activation
@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)])
def test_inputs_without_elements_pass(activation, shape):
    noise = drawn(activation, 0.5)
    assert noise.apply(torch.empty(shape)).shape == shape
    noise.follow()
    assert noise.ends is None


def test_the_gradient_is_the_identity_inside_a_range_that_holds_all():
    x, outer = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    for rate in (0.5, 1.0):
        x.grad = None
        drawn(Int(3), rate).apply(x).backward(outer)
        assert torch.equal(x.grad, outer)


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_static_range_passes_gradients_inside_and_none_outside(rate, symmetric):
    noise = drawn(Int(4, mode="static", symmetric=symmetric), rate)
    noise.ends = torch.tensor([-0.7, 1.0])
    x, outer = (2 * torch.randn(40, 7)).requires_grad_(), torch.randn(40, 7)
    noisy = noise.apply(x)
    rounded, (low, high) = grid(x.detach(), 4, symmetric, (-0.7, 1.0))
    clamped = x.detach().clamp(low, high)
    expected = torch.where(noise._cut(noise.mask, x), rounded.float(), clamped) if rate < 1 else rounded.float()
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-6)
    noisy.backward(outer)
    inside = (x > low) & (x < high)
    assert 0 < inside.float().mean() < 1
    assert torch.equal(x.grad, outer * inside)


def test_the_gradient_is_that_of_clamping_by_finite_differences():
    noise = drawn(STATIC, 1.0)
    noise.ends = torch.tensor([-1.0, 2.0])
    x = torch.linspace(-3, 3, 24, dtype=torch.float64).view(2, 12).requires_grad_()
    noise.apply(x).sum().backward()
    low, high = grid(x.detach(), 4, False, (-1.0, 2.0))[1]
    step = 1e-6
    slope = ((x + step).clamp(low, high) - (x - step).clamp(low, high)).detach() / (2 * step)
    torch.testing.assert_close(x.grad, slope)


def test_a_dynamic_range_that_cuts_has_no_gradient_where_it_cuts():
    x = torch.cat([torch.randn(3, 2000), torch.full((3, 1), 20.0)], dim=1).requires_grad_()
    noise = drawn(Int(3, range="mse"), 1.0)
    noisy = noise.apply(x)
    assert (noisy[:, -1] < 19).all()
    noisy.sum().backward()
    assert (x.grad[:, -1] == 0).all() and x.grad.mean() > 0.7


@each_activation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_stay(activation, dtype):
    x = torch.randn(5, 7).to(dtype).requires_grad_()
    noise = drawn(activation, 0.5)
    for _ in range(2):
        noisy = noise.apply(x)
        assert noisy.dtype == dtype and torch.isfinite(noisy).all()
        noise.follow()
    noisy.sum().backward()
    assert x.grad.dtype == dtype


def test_the_running_range_equals_its_formula():
    noise, ends = drawn(STATIC, 0.5), None
    for step in range(6):
        x = torch.randn(20, 7) * (1 + step) - step
        noisy = noise.apply(x)
        used = ends or (min(x.min().item(), 0), max(x.max().item(), 0))  # in the first batch its own
        rounded, (low, high) = grid(x, 4, False, tuple(used))
        mask = noise._cut(noise.mask, x)
        torch.testing.assert_close(noisy, torch.where(mask, rounded.float(), x.clamp(low, high)), rtol=1e-4, atol=1e-5)
        noise.follow()
        seen = [min(x.min().item(), 0), max(x.max().item(), 0)]
        ends = seen if ends is None else [0.9 * old + 0.1 * new for old, new in zip(ends, seen, strict=True)]
        np.testing.assert_allclose(noise.ends, ends, rtol=1e-5)
        noise.follow()  # once a batch, whoever calls
        np.testing.assert_allclose(noise.ends, ends, rtol=1e-5)


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "histogram"])
@pytest.mark.parametrize("shape", [(4096, 64), (128, 48, 64), (2, 64, 4096), (4096, 48)], ids=str)
def test_the_running_range_is_of_all_features_also_where_it_is_of_a_sample(method, shape):
    """As large inputs are sampled, no feature and no channel may be all that is seen."""
    x = torch.randn(shape)
    x[..., 0], x[:, 0] = 0, 0
    noise = drawn(Int(8, mode="static", range=method), 1.0)
    noise.apply(x)
    noise.follow()
    assert noise.ends[0] < -2.5 and noise.ends[1] > 2.5


def test_only_training_moves_the_running_range():
    noise = drawn(STATIC, 1.0)
    noise.apply(torch.randn(5, 7))
    noise.follow()
    before = noise.ends.clone()
    noise.apply(100 * torch.randn(5, 7), in_training=False)
    noise.follow()
    assert torch.equal(noise.ends, before)


def test_running_ranges_go_on_from_their_state():
    def make():
        schemes = {"a": Int(8, activation=STATIC), "b": Int(8, activation=Int(4))}
        return InputNoises(schemes, {"a": (5, 7), "b": (5, 7)})

    noises = make()
    noises.of["a"].apply(torch.randn(5, 7))
    noises.of["b"].apply(torch.randn(5, 7))
    state = noises.state_dict()
    assert list(state) == ["a"]
    again = make()
    again.load_state_dict(state | {"other": torch.zeros(2)}, torch.device("cpu"))
    assert torch.equal(again.of["a"].ends, noises.of["a"].ends) and again.of["b"].ends is None


@each_activation
def test_the_global_random_state_is_not_touched(activation):
    before = torch.get_rng_state()
    drawn(activation, 0.5).apply(torch.zeros(5, 7))
    assert torch.equal(torch.get_rng_state(), before)


class Block(nn.Module):
    """Layers whose inputs can be quantized, with what lies between them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return x + self.fc(torch.tanh(self.conv(x)).mT).mT


def noised(model, activation, **options):
    return noisy_inputs(model, {"*": Int(4, activation=activation)}, **options)


@each_activation
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_recomputation_sees_the_same_noise(activation, reentrant, weights):
    model, x = nn.Sequential(Block(), Block()), torch.randn(3, 4, 9)
    inputs = noised(model, activation, weights=weights)

    def run(steps):
        inputs.load_state_dict({}, torch.device("cpu"))
        for noise in inputs.of.values():
            noise.ends = None
        inputs.draw(0.5, torch.Generator().manual_seed(1))
        found = []
        for step in range(3):
            model.zero_grad()
            start = (x * (1 + step)).requires_grad_()
            out = steps(start)
            out.square().sum().backward()
            found += [out.detach(), start.grad, *(p.grad.clone() for p in model.parameters())]
            inputs.follow()
        return found + [noise.ends for noise in inputs.of.values() if noise.ends is not None]

    def checkpointed(h):
        for block in model:
            h = checkpoint(block, h, use_reentrant=reentrant)
        return h

    expected, got = run(model), run(checkpointed)
    assert len(expected) == len(got)
    for one, other in zip(got, expected, strict=True):  # without gradients, torch's kernels round otherwise
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_evaluation_is_without_noise_except_where_it_belongs():
    layer, x = nn.Linear(7, 5), torch.randn(4, 7)
    plain = copy.deepcopy(layer)
    noise = InputNoise(Int(2), (5, 7), "weight")
    attach_inputs(layer, {"weight": noise})
    assert not torch.equal(layer(x), plain(x))
    layer.eval()
    assert torch.equal(layer(x), plain(x))
    held = InputNoise(Int(2), (5, 7), "weight", in_eval=True)
    attach_inputs(layer, {"weight": held})  # the newest counts
    expected = plain(torch.stack([grid(row, 2)[0] for row in x]).float())
    for mode in (True, False):
        layer.train(mode)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(input=x), expected, rtol=1e-4, atol=1e-5)


def test_attached_noise_leaves_without_a_trace():
    model = nn.Sequential(Block(), nn.Linear(9, 3))
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    noised(model, Int(4))
    model(torch.randn(2, 4, 9)).sum().backward()
    assert list(model.state_dict()) == list(state)
    clone = copy.deepcopy(model)
    assert {name: type(m) for name, m in clone.named_modules()} == {name: kind for name, (kind, _) in before.items()}
    detach(model)
    for name, module in model.named_modules():
        assert type(module) is before[name][0] and vars(module).keys() == before[name][1].keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_only_layers_that_take_a_plain_input_are_noised():
    model = TiedByName()
    plain = copy.deepcopy(model)
    noised(model, Int(2), rate=1.0, weights=False)
    ids = torch.arange(20).view(4, 5)
    assert torch.equal(model.embed(ids), plain.embed(ids))
    x = plain.embed(ids).detach()
    rounded = torch.stack([grid(row, 2)[0] for row in x.view(-1, 16)]).float().view_as(x)
    torch.testing.assert_close(model(ids), plain.out(rounded), rtol=1e-4, atol=1e-5)
