"""Noise against references written out here: the same model with its noisy weights as plain dense ones."""

import copy

import pytest
import torch
from models import Attention, dense, draw, noisy, small_pq
from torch import nn

from lightning_qnoise import PQ, Int
from lightning_qnoise.attach import attach
from lightning_qnoise.noise import WeightNoise, quant_noise
from lightning_qnoise.policy import resolve

IDS = torch.arange(20).view(4, 5)
X = torch.linspace(-1, 1, 2 * 6 * 16).view(2, 6, 16)


@pytest.mark.parametrize(("shape", "unit"), [((6, 8), 4), ((6, 2, 3, 3), 9), ((6, 2, 3, 3), 18), ((5, 3), 1)])
def test_quant_noise_takes_whole_blocks_from_the_target(shape, unit):
    weight, target = torch.randn(shape), torch.randn(shape)
    mask = torch.rand(shape[0], weight[0].numel() // unit) < 0.5
    got = quant_noise(weight, target.reshape(*mask.shape, unit), mask).reshape(-1, unit)
    for i, dropped in enumerate(mask.flatten().tolist()):
        expected = (target if dropped else weight).reshape(-1, unit)[i]
        assert torch.equal(got[i], expected), i


@pytest.mark.parametrize("kind", ["exact", "zero", "mean"])
@pytest.mark.parametrize("scheme", [PQ(4, 8), Int(4)], ids=str)
def test_the_gradient_is_the_identity_also_on_dropped_blocks(scheme, kind):
    weight, outer = nn.Parameter(torch.randn(8, 16)), torch.randn(8, 16)
    noise = WeightNoise(weight, scheme, kind)
    noise.draw(weight, 1.0, torch.Generator())
    assert not torch.equal(noise.apply(weight), weight)
    noise.apply(weight).backward(outer)
    assert torch.equal(weight.grad, outer)


def test_the_gradient_of_a_forward_is_that_of_the_dense_noisy_model_by_finite_differences():
    model = nn.Linear(8, 4).double()
    noises, x = noisy(model, {"*": PQ(4, 2)}), torch.randn(3, 8).double()
    loss = model(x).square().sum()
    loss.backward()
    at = dense(model, noises)
    for i, j in [(0, 0), (1, 5), (3, 7)]:
        values = []
        for step in (1e-5, -1e-5):
            moved = copy.deepcopy(at)
            with torch.no_grad():
                moved.weight[i, j] += step
            values.append(moved(x).square().sum().item())
        assert model.weight.grad[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_a_layer_that_the_user_keeps_in_eval_mode_gets_no_noise():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plain = copy.deepcopy(model)
    noisy(model, rate=1.0, kind="zero")
    model[0].eval()
    torch.testing.assert_close(model(X), plain[1].bias.expand(2, 6, 16))
    model[1].eval()
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_blocks_are_dropped_at_the_rate(rate):
    weight = torch.randn(1000, 800)  # 100,000 blocks of 8
    noise = WeightNoise(weight, PQ(8, 256), "zero")
    noise.draw(weight, rate, torch.Generator().manual_seed(1))
    n, dropped = noise.mask.numel(), int(noise.mask.sum())
    assert n == 100_000
    assert abs(dropped - n * rate) < 4 * (n * rate * (1 - rate)) ** 0.5


CUT = {
    "linear": ((32, 48), PQ(8, 16)),
    "table": ((50, 16), PQ(8, 16)),
    "conv1x1": ((32, 16, 1, 1), PQ(4, 16)),
    "kernel": ((32, 16, 3, 3), PQ(9, 16)),
    "two_kernels": ((32, 16, 3, 3), PQ(18, 16)),
    "depthwise": ((32, 1, 3, 3), PQ(9, 16)),
    "conv1d": ((32, 6, 5), PQ(5, 16)),
    "conv3d": ((32, 4, 2, 2, 2), PQ(8, 16)),
}


@pytest.mark.parametrize(("shape", "scheme"), CUT.values(), ids=CUT)
def test_zeroed_elements_are_whole_blocks_of_pq(shape, scheme):
    weight = torch.rand(shape) + 1
    noise = WeightNoise(weight, scheme, "zero")
    noise.draw(weight, 0.5, torch.Generator().manual_seed(0))
    zeros = (noise.apply(weight) == 0).reshape(-1, scheme.block_size)
    assert torch.equal(zeros.any(dim=1), zeros.all(dim=1))
    assert torch.equal(zeros.all(dim=1), noise.mask.flatten())
    assert 0 < zeros.float().mean() < 1
    if scheme.block_size == 9:  # a block is one kernel, seen in the weight's own shape
        assert torch.equal(noise.apply(weight).flatten(2).eq(0).all(dim=2), noise.mask.view(shape[0], -1))


def test_exact_noise_assigns_blocks_to_the_nearest_codeword_of_the_current_weight():
    weight = torch.randn(64, 32)
    noise = WeightNoise(weight, PQ(4, 8))
    generator = torch.Generator().manual_seed(0)
    noise.draw(weight, 1.0, generator)
    codebook = noise.target.codebook.float()
    weight = torch.randn(64, 32)  # what an optimizer may make of it
    noise.draw(weight, 0.5, generator)
    assert torch.equal(noise.target.codebook.float(), codebook)
    blocks, got = weight.view(-1, 4), noise.apply(weight).view(-1, 4)
    for i, dropped in enumerate(noise.mask.flatten().tolist()):
        nearest = codebook[(blocks[i] - codebook).square().sum(dim=1).argmin()]
        assert torch.equal(got[i], nearest if dropped else blocks[i])


def test_rate_zero_and_undrawn_masks_are_no_noise():
    model = nn.Linear(16, 16)
    plain = copy.deepcopy(model)
    noises = attach(model, resolve(model, small_pq(model)))
    assert torch.equal(model(X), plain(X))
    draw(model, noises, rate=1.0)
    assert not torch.equal(model(X), plain(X))
    draw(model, noises, rate=0.0)
    assert torch.equal(model(X), plain(X))


def test_the_global_random_state_is_not_touched():
    model = nn.Linear(16, 16)
    before = torch.get_rng_state()
    noisy(model)
    model(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_draws_the_same_masks_and_another_seed_others():
    masks = [noisy(nn.Linear(64, 64), seed=seed)["weight"].mask for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_an_unknown_kind_is_refused_before_anything_changes():
    model = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="kind must be one of exact, zero, mean, got 'median'"):
        attach(model, {"weight": PQ(4, 8)}, "median")
    assert type(model) is nn.Linear


def test_outside_a_forward_every_reader_sees_the_parameters():
    model = nn.Sequential(nn.Linear(16, 16), Attention())
    plain = copy.deepcopy(model)
    noisy(model, rate=1.0)
    model(X).sum().backward()
    assert model[0].weight is model[0]._parameters["weight"]
    assert model[1].attn.out_proj.weight is dict(model.named_parameters())["1.attn.out_proj.weight"]
    for (name, value), (_, expected) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name
    average = torch.optim.swa_utils.AveragedModel(model)
    assert torch.equal(average.module[0].weight, plain[0].weight)
    model[0].weight.data.clamp_(-0.01, 0.01)
    assert model[0]._parameters["weight"].abs().max() <= 0.01
