"""The moving average against an explicit recursion."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qnoise.distill import MovingAverage


def walk(model, n):
    """Random values for all parameters, n times."""
    for step in range(n):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        yield


def recursion(first, values, decay):
    average = np.asarray(first, dtype=np.float64)
    for t, value in enumerate(values, 1):
        d = min(decay, t / (t + 1))
        average = d * average + (1 - d) * value
    return average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_recursion(decay):
    model = nn.Linear(5, 3)
    average = MovingAverage(model, decay)
    first, values = model.weight.detach().double().numpy(), []
    for _ in walk(model, 12):
        average.update(model)
        values.append(model.weight.detach().double().numpy())
    expected = recursion(first, values, decay)
    np.testing.assert_allclose(average.model.weight.numpy(), expected, rtol=1e-5, atol=1e-6)
    if decay == 0.999:  # still the plain mean
        np.testing.assert_allclose(expected, np.mean([first, *values], axis=0), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_copy_does_not_lose_small_updates(dtype):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, 0.999, dtype)
    for _ in range(2000):
        average.n_updates = 10**6  # beyond the plain mean
        average.update(model)
        model.weight.data.fill_(2.0)
    assert average.model.weight.dtype == dtype
    assert average.model.weight.item() == pytest.approx(2 - 0.999**1999, abs=1e-2)


def test_a_half_precision_model_is_averaged_in_fp32():
    model = nn.Linear(2, 2).bfloat16()
    state = MovingAverage(model, 0.9).state_dict()
    assert {tensor.dtype for tensor in state["means"].values()} == {torch.float32}


def test_buffers_are_the_models_own_and_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    average = MovingAverage(model, 0.9)
    model(torch.randn(8, 3))
    assert not torch.equal(average.model[1].running_mean, model[1].running_mean)
    average.update(model)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert average.model[1].num_batches_tracked == 1
    assert average.model[2].weight is average.model[0].weight
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_goes_on_bit_equally_from_plain_data(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    whole = MovingAverage(model, 0.6, dtype)
    for step, _ in enumerate(walk(model, 6)):
        whole.update(model)
        if step == 2:
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
            file.seek(0)
            resumed = MovingAverage(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 0.6, dtype)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            assert torch.equal(resumed.model[0].weight, whole.model[0].weight)
        elif step > 2:
            resumed.update(model)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_state_of_another_model_is_refused():
    state = MovingAverage(nn.Linear(3, 3), 0.9).state_dict()
    with pytest.raises(ValueError, match="of another model"):
        MovingAverage(nn.Linear(3, 4), 0.9).load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        MovingAverage(nn.Linear(1, 1), decay)
