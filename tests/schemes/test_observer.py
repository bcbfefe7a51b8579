"""The range of batches against the range of all of them at once."""

import numpy as np
import pytest
import torch

from lightning_qnoise.schemes import Observer
from lightning_qnoise.schemes.ranges import affine_grid, find_range, round_trip

HISTOGRAMS = ["mse", "percentile", "histogram"]
TOLERANCE = {"minmax": 1.0, "mse": 1.1, "histogram": 2.5}  # divergence depends on where the bins end, see below
each_histogram = pytest.mark.parametrize("method", HISTOGRAMS)
each_method = pytest.mark.parametrize("method", ["minmax", *HISTOGRAMS])


def observed(batches, method, bits=8, symmetric=False):
    observer = Observer(bits, symmetric, method)
    for batch in batches:
        observer.update(batch)
    return torch.stack(observer.find_range())


def batches_of(kind, n=7):
    """Batches of growing sizes and odd shapes."""
    batches = [torch.randn(3 + i, 5, 41) * (1 + 0.3 * i) for i in range(n)]
    make = {"normal": lambda x: x, "relu": torch.relu, "skewed": lambda x: (x / 2).exp() - 0.5}[kind]
    return [make(batch) for batch in batches]


KINDS = ["normal", "relu", "skewed"]


def test_minmax_is_that_of_all_batches_in_any_order():
    batches = batches_of("skewed")
    whole = torch.cat([batch.flatten() for batch in batches])
    expected = torch.stack([whole.min().clamp(max=0), whole.max().clamp(min=0)])
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 6, 0, 2, 5, 1, 4]):
        assert torch.equal(observed([batches[i] for i in order], "minmax"), expected)


@each_method
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_order_of_batches_does_not_matter_where_the_largest_is_the_same(method, symmetric):
    """Then all histograms have the same bins, and equal counts."""
    batches = [torch.cat([batch.flatten(), torch.tensor([-20.0, 20.0])]) for batch in batches_of("normal")]
    expected = observed(batches, method, 4, symmetric)
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 6, 0, 2, 5, 1, 4]):
        assert torch.equal(observed([batches[i] for i in order], method, 4, symmetric), expected)


@each_method
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_other_batches_moves_a_range_by_a_few_bins(method, kind):
    """The first batch chooses the bins (its largest value, times a power of two), so they differ.

    A divergence is of bins in units of the largest value; where that fills half of the bins only, heavy tails are cut
    up to twice as far out.
    """
    batches = batches_of(kind)
    size = max(batch.abs().max().item() for batch in batches)
    expected = observed(batches, method)
    values = torch.cat([batch.flatten() for batch in batches])
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 6, 0, 2, 5, 1, 4]):
        got = observed([batches[i] for i in order], method)
        if method in ("minmax", "percentile"):
            assert (got - expected).abs().max() <= 2 * size / 2048
        else:  # nearly flat at their best: compare what they are for
            assert error(values, got) <= TOLERANCE[method] * error(values, expected)


def error(values, ends, bits=8, symmetric=False):
    grid = affine_grid(*ends, bits, symmetric)
    return (round_trip(values, *grid, bits) - values).square().mean().item()


@each_histogram
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits, symmetric", [(8, False), (4, True)])
def test_batches_agree_with_one_shot(method, kind, bits, symmetric):
    batches = batches_of(kind)
    values = torch.cat([batch.flatten() for batch in batches])
    expected = torch.stack(find_range(values, bits, symmetric, method))
    got = observed(batches, method, bits, symmetric)
    width = 2 * values.abs().max() / 2048  # of the bins, after the limit has grown
    if method == "percentile":
        assert (got - expected).abs().max() <= width
    else:
        assert error(values, got, bits, symmetric) <= TOLERANCE[method] * error(values, expected, bits, symmetric)
    assert got[0] <= 0 <= got[1]
    assert got[0] >= values.min().clamp(max=0) and got[1] <= values.max().clamp(min=0)


def test_growth_of_the_limit_keeps_every_count():
    """A histogram that was merged pair by pair equals one of the final bins."""
    small, large = torch.rand(5000) - 0.5, torch.tensor([3.9])
    observer = Observer(8, False, "mse")
    observer.update(torch.tensor([0.5]))  # the limit itself counts in the last bin
    observer.update(small)
    observer.update(large)
    observer.update(small * 4)
    limit = 4.0  # 0.5, doubled three times
    assert observer._limit == limit
    values = torch.cat([torch.tensor([0.4999]), small, large, small * 4]).double().numpy()
    for sign, counts in zip((1, -1), observer._counts, strict=True):
        side = values[values >= 0] if sign > 0 else -values[values < 0]
        bins = np.minimum((side * (2048 / limit)).astype(int), 2047)
        np.testing.assert_array_equal(counts, np.bincount(bins, minlength=2048))


@each_histogram
def test_growth_over_many_orders_of_magnitude(method):
    batches = [torch.randn(1000) * 10.0**power for power in (-6, -3, 0, 3)]
    values = torch.cat(batches)
    assert error(values, observed(batches, method)) <= 1.5 * error(values, find_range(values, 8, False, method))


@pytest.mark.parametrize("symmetric", [False, True])
def test_ema_equals_its_formula(symmetric):
    batches = batches_of("skewed") + batches_of("normal")
    low, high = min(batches[0].min().item(), 0), max(batches[0].max().item(), 0)
    for batch in batches[1:]:
        low += 0.1 * (min(batch.numpy().min(), 0) - low)
        high += 0.1 * (max(batch.numpy().max(), 0) - high)
    np.testing.assert_allclose(observed(batches, "ema", 8, symmetric), [low, high], rtol=1e-5)


@pytest.mark.parametrize("method", ["minmax", "ema", *HISTOGRAMS])
def test_empty_batches_change_nothing(method):
    batches = batches_of("normal", 3)
    empty = [torch.empty(0), torch.empty(3, 0, 5)]
    got = observed([*empty, batches[0], *empty, *batches[1:], *empty], method)
    assert torch.equal(got, observed(batches, method))
    with pytest.raises(RuntimeError, match="no input has reached it"):
        observed(empty, method)


@pytest.mark.parametrize("method", ["minmax", "ema", *HISTOGRAMS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_and_inf_are_errors_in_any_batch(method, value, place):
    batches = batches_of("normal", 3)
    batches[place][0, 0, 0] = value
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        observed(batches, method)


@pytest.mark.parametrize("method", ["minmax", "ema", *HISTOGRAMS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_go_through_float32(method, dtype):
    batches = [batch.to(dtype) for batch in batches_of("normal", 3)]
    got = observed(batches, method)
    assert got.dtype == torch.float32
    assert torch.equal(got, observed([batch.float() for batch in batches], method))


@pytest.mark.parametrize("method", ["minmax", "ema", *HISTOGRAMS])
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e30, 1e-38, -1e-44])
def test_constant_inputs(method, value):
    low, high = observed([torch.full((3, 4), value)] * 2, method)
    assert low.item() == pytest.approx(min(value, 0), rel=1e-3, abs=1e-37)
    assert high.item() == pytest.approx(max(value, 0), rel=1e-3, abs=1e-37)


@each_histogram
def test_batches_of_zeros_count(method):
    """They are values as others are: before, between and after."""
    zeros, values = torch.zeros(200_000), torch.randn(1000)
    expected = torch.stack(find_range(torch.cat([zeros, values]), 8, False, method))
    for batches in ([zeros, values], [values, zeros], [torch.cat([zeros, values])]):
        got = observed(batches, method)
        assert (got - expected).abs().max() <= 2 * values.abs().max() / 2048


def test_nothing_is_kept_of_the_graph_and_the_input_stays():
    x = torch.randn(5, 7, requires_grad=True)
    before = x.detach().clone()
    observer = Observer(8, False, "mse")
    observer.update(x)
    assert torch.equal(x, before)
    assert not any(end.requires_grad for end in observer.find_range())
    assert observer._counts.grad_fn is None
