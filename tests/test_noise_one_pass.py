"""Noise as it runs on GPUs, by one operator that draws the blocks itself; here with the operator's reference.

It is held against the noise of CPUs, which the other files test, with the mask that was drawn.
"""

import copy
from itertools import pairwise

import pytest
import torch
from fits import PQS, checkpoint, equal, fit, net
from models import Attention, TiedByName, TiedByRead, dense, draw, gradients, mlp, noisy, small_pq
from test_noise_layers import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, TensorDataset

from lightning_qnoise import PQ, Int, LinearRate, Quantize, QuantNoise
from lightning_qnoise import noise as module
from lightning_qnoise.attach import attach
from lightning_qnoise.noise import WeightNoise, runs_in_one_pass
from lightning_qnoise.ops.philox import philox_mask
from lightning_qnoise.policy import resolve
from lightning_qnoise.schemes import PackedWeight

X = torch.linspace(-1, 1, 4 * 16).view(4, 16)
SCHEMES = {
    "pq": (PQ(4, 8), "exact"),
    "pq, more codewords": (PQ(2, 300), "exact"),
    "pq, 3 bits": (PQ(8, 6, codebook_dtype="float32"), "exact"),
    "pq, integers": (PQ(4, 8, codebook=Int(8, granularity="tensor")), "exact"),
    "zero": (PQ(8, 8), "zero"),
    "mean": (PQ(8, 8), "mean"),
    "int8": (Int(8), "exact"),
    "int4, tensor": (Int(4, granularity="tensor"), "exact"),
    "int3, groups": (Int(3, granularity="group:8", symmetric=True), "exact"),
    "fixed": (Int(3, range="mse"), "exact"),
    "fixed, tensor": (Int(4, granularity="tensor", symmetric=True, range="percentile"), "exact"),
    "fixed, groups": (Int(2, granularity="group:8", range="histogram"), "exact"),
}
each_scheme = pytest.mark.parametrize(("scheme", "kind"), SCHEMES.values(), ids=SCHEMES)


@pytest.fixture(autouse=True)
def _in_one_pass(monkeypatch):
    monkeypatch.setattr(module, "runs_in_one_pass", lambda device: True)


def by_mask(noise, weight):
    """The noise of CPUs with the same target and the same blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "runs_in_one_pass", lambda device: False)
        twin = WeightNoise(weight, noise.scheme, noise.kind)
    twin.target, twin.mask, twin.active = noise.target, noise.drawn(), noise.active
    return twin


def masked(noises):
    """The noises as `dense` reads them."""
    for noise in noises.values():
        noise.mask = noise.drawn()
    return noises


def test_the_pass_is_for_gpus_with_triton(monkeypatch):
    assert not runs_in_one_pass(torch.device("cpu"))
    for has in (True, False):
        monkeypatch.setattr(module, "has_triton", lambda has=has: has)
        assert runs_in_one_pass(torch.device("cuda", 1)) == has
        assert not runs_in_one_pass(torch.device("mps"))


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_are_bit_equal_to_those_with_a_mask(scheme, kind, dtype):
    weight = nn.Parameter(torch.randn(40, 32).to(dtype))
    noise, generator = WeightNoise(weight, scheme, kind), torch.Generator().manual_seed(0)
    assert not hasattr(noise, "mask")
    for rate in (0.3, 1.0, 0.7):
        noise.draw(weight, rate, generator)
        mask = noise.drawn()
        assert torch.equal(mask, philox_mask(noise.seed, noise.rate, *mask.shape))
        assert abs(mask.float().mean() - rate) < 0.2
        outer, results = torch.randn(40, 32).to(dtype), []
        for each in (noise, by_mask(noise, weight)):
            weight.grad = None
            noisy_weight = each.apply(weight)
            noisy_weight.backward(outer)
            results.append((noisy_weight.detach(), weight.grad))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        assert not torch.equal(results[0][0], weight)
        with torch.no_grad():
            weight.mul_(1.5)  # what an optimizer may make of it


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("policy", "kind"), [("pq", "exact"), ("int4", "exact"), ("pq", "zero"), ("pq", "mean")])
def test_a_training_forward_is_that_of_the_dense_noisy_model(name, policy, kind):
    make, x = MODELS[name]
    model = make()
    clean = copy.deepcopy(model)(x)
    noises = masked(noisy(model, policy, kind=kind))
    expected = dense(model, noises)(x)
    assert not torch.allclose(clean, expected, atol=1e-3)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_draws_write_the_same_memory_and_every_weight_has_a_seed_of_its_own():
    model = nn.Sequential(*[nn.Linear(32, 64) for _ in range(3)])
    noises = noisy(model, seed=1)
    places = [(noise.seed.data_ptr(), noise.rate.data_ptr()) for noise in noises.values()]
    first = [noise.drawn() for noise in noises.values()]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    draw(model, noises, rate=0.2, seed=2)
    assert [(noise.seed.data_ptr(), noise.rate.data_ptr()) for noise in noises.values()] == places
    assert [noise.rate.item() for noise in noises.values()] == [pytest.approx(0.2)] * 3
    assert not any(torch.equal(noise.drawn(), mask) for noise, mask in zip(noises.values(), first, strict=True))
    draw(model, noises, seed=1)
    assert all(torch.equal(noise.drawn(), mask) for noise, mask in zip(noises.values(), first, strict=True))
    assert len({noise.seed.item() for noise in noises.values()}) == 3


def test_rate_zero_is_no_noise_and_the_global_random_state_is_not_touched():
    model = mlp()
    plain, before = copy.deepcopy(model), torch.get_rng_state()
    noises = noisy(model)
    assert not torch.equal(model(X), plain(X))
    draw(model, noises, rate=0.0)
    assert torch.equal(model(X), plain(X))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_a_scheme_whose_encoding_follows_the_weight_makes_the_mask(monkeypatch):
    made = []
    drawn = WeightNoise.drawn
    monkeypatch.setattr(WeightNoise, "drawn", lambda self: made.append(self.scheme) or drawn(self))
    weight = torch.randn(16, 16)
    for scheme, kind in [(PQ(4, 8), "exact"), (PQ(4, 8), "zero"), (Int(4), "exact"), (Int(4, range="mse"), "exact")]:
        WeightNoise(weight, scheme, kind).draw(weight, 0.5, torch.Generator())
    assert made == [PQ(4, 8)]


@each_scheme
def test_a_scheme_without_arguments_of_its_own_gives_its_blocks(scheme, kind, monkeypatch):
    weight, results = nn.Parameter(torch.randn(40, 32)), []
    noise = WeightNoise(weight, scheme, kind)
    noise.draw(weight, 0.5, torch.Generator())
    with torch.no_grad():
        weight.mul_(2)
    for _ in range(2):
        weight.grad = None
        noisy_weight = noise.apply(weight)
        noisy_weight.sum().backward()
        results.append((noisy_weight.detach(), weight.grad))
        target = type(scheme.empty(weight.shape, device="meta"))
        monkeypatch.setattr(target, "noise_arguments", PackedWeight.noise_arguments)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["pq", "int4", {"*": Int(4, range="mse")}], ids=str)
def test_activation_checkpointing_gives_equal_gradients(policy, reentrant):
    model, x = mlp(), X.clone().requires_grad_()
    clean = gradients(model, lambda: model(x))
    noisy(model, policy, rate=0.9)
    expected = gradients(model, lambda: model(x))
    got = gradients(model, lambda: recompute(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(got[0], clean[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("policy", "kind"),
    [("pq", "exact"), ("pq", "zero"), ("pq", "mean"), ("int8", "exact"), ({"*": Int(4, range="mse")}, "exact")],
    ids=str,
)
@pytest.mark.parametrize("make", [mlp, Attention, TiedByName, TiedByRead])
def test_compile_takes_the_whole_graph_once_for_all_seeds_and_rates(make, policy, kind):
    torch._dynamo.reset()
    model, graphs = make(), []
    x = torch.arange(20).view(4, 5) if "Tied" in type(model).__name__ else X.view(1, 4, 16)
    noises = attach(model, resolve(model, small_pq(model) if policy == "pq" else policy), kind)

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    outputs = []
    for step in range(4):
        draw(model, noises, rate=0.3 + 0.1 * step, seed=step)
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], model(x))
        outputs[-1].sum().backward()
    assert len(graphs) == 1
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("policy", ["pq", "int8", {"*": Int(4, range="mse")}], ids=str)
def test_compiled_gradients_equal_the_eager_ones(policy):
    torch._dynamo.reset()
    model = mlp()
    noises = noisy(model, policy, rate=0.7)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        draw(model, noises, rate=0.2 + 0.3 * step, seed=step)
        expected = gradients(model, lambda: model(X))
        for got, want in zip(gradients(model, lambda: compiled(X)), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_autocast_channels_last_and_function_transforms():
    model = mlp()
    noises = masked(noisy(model, "int8", rate=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), dense(model, noises)(X))
    layer = nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last)
    noise = noisy(layer, rate=0.5, kind="zero")["weight"]
    assert noise.apply(layer.weight).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(noise.apply(layer.weight), by_mask(noise, layer.weight).apply(layer.weight))
    linear = nn.Linear(16, 8)
    noisy(linear, {"*": Int(2)}, rate=1.0)
    weights = {"weight": torch.randn(8, 16), "bias": torch.randn(8)}
    grads = torch.func.grad(lambda w: torch.func.functional_call(linear, w, X).sum())(weights)
    torch.testing.assert_close(grads["weight"], X.sum(dim=0).expand(8, 16))


class Same(type(net())):
    """Eight batches with the same rows: Lightning does not restore the place in a plain DataLoader."""

    def train_dataloader(self):
        x, y = next(iter(super().train_dataloader()))
        return DataLoader(TensorDataset(x.repeat(8, 1), y.repeat(8)), 8)


SETTINGS = {
    "pq": {"policy": PQS, "rate": 0.5, "refresh": 3},
    "int8": {"policy": "int8", "rate": LinearRate(0.2, 0.9)},
    "fixed": {"policy": Int(4, range="mse"), "rate": 0.5},
    "mean": {"policy": PQS, "rate": 0.5, "kind": "mean"},
}


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
)
@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_equal(name):
    whole, other = net(cls=Same), net(cls=Same)
    fit(whole, [QuantNoise(**SETTINGS[name]), checkpoint(every_n_train_steps=4)], max_epochs=2)
    for path in ("epoch=0-step=8", "epoch=0-step=4"):
        resumed = net(cls=Same, seed=9)
        fit(resumed, [QuantNoise(**SETTINGS[name])], max_epochs=2, ckpt_path=f"ckpt/{path}.ckpt")
        assert equal(resumed, whole), path
    fit(other, [QuantNoise(**SETTINGS[name], seed=1)], max_epochs=2)
    assert not equal(other, whole)


def test_noise_then_a_packed_model():
    model = net()
    made = fit(model, [QuantNoise(PQS, rate=0.2), Quantize()], max_epochs=2)
    assert made.callback_metrics["quantized/val_acc"] > 0.3
