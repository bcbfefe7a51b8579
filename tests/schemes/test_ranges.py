"""Ranges against brute force in NumPy, and what each method promises."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qnoise import Int
from lightning_qnoise.noise import WeightNoise
from lightning_qnoise.schemes.ranges import affine_grid, check_range, find_range, round_trip

METHODS = ["minmax", "mse", "percentile", "histogram"]
each_method = pytest.mark.parametrize("method", METHODS)
each_bits = pytest.mark.parametrize("bits", range(2, 9))
each_symmetric = pytest.mark.parametrize("symmetric", [False, True])

ROWS = {
    "normal": lambda: torch.randn(777),
    "heavy": lambda: torch.randn(777) ** 3,
    "relu": lambda: torch.randn(777).relu(),
    "shifted": lambda: torch.rand(777) + 3,
    "negative": lambda: -torch.rand(777) - 3,
    "outlier": lambda: torch.cat([torch.randn(776), torch.tensor([40.0])]),
    "skewed": lambda: torch.randn(777).exp() - 0.2,
    "few": lambda: torch.tensor([0.5, -2.0, 1.0]),
    "one": lambda: torch.tensor([-0.7]),
    "constant": lambda: torch.full((50,), 0.3),
    "zeros": lambda: torch.zeros(50),
}
each_row = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)


def squared_error(values, low, high, bits, symmetric, counts=1.0):
    """Of rounding to the levels of a range, float64."""
    values, low, high = (np.asarray(part, np.float64) for part in (values, low, high))
    top = 2**bits - 1
    scale = max(high, -low) / ((top - 1) / 2) if symmetric else (high - low) / top
    scale = scale or 1.0
    zero = 2 ** (bits - 1) if symmetric else np.rint(-low / scale)
    codes = np.clip(np.rint(values / scale) + zero, 0, top)
    return float((np.square((codes - zero) * scale - values) * counts).sum())


@each_row
@pytest.mark.parametrize("method", ["minmax", "ema"])
def test_minmax_holds_all_values_and_zero(make, method):
    values = make()
    low, high = find_range(values, 8, False, method)
    assert (low.item(), high.item()) == (min(values.numpy().min(), 0), max(values.numpy().max(), 0))


@each_bits
@each_symmetric
def test_least_squares_equal_brute_force(bits, symmetric):
    for name, make in ROWS.items():
        values = make()
        low, high = (end.item() for end in find_range(values, bits, symmetric, "mse"))
        whole = min(values.min().item(), 0), max(values.max().item(), 0)
        shrinks = [1 - step / 64 for step in range(48)]
        errors = [squared_error(values, whole[0] * s, whole[1] * s, bits, symmetric) for s in shrinks]
        got = squared_error(values, low, high, bits, symmetric)
        assert got <= min(errors) * (1 + 1e-3) + 1e-9, name
        assert any(np.allclose((low, high), (whole[0] * s, whole[1] * s), rtol=1e-6) for s in shrinks), name


@each_bits
@each_symmetric
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:12"])
def test_least_squares_are_never_worse_than_minmax(bits, symmetric, granularity):
    for make in (torch.randn, lambda *shape: torch.randn(*shape) ** 3, torch.rand, lambda *shape: torch.ones(shape)):
        weight = make(7, 24)
        weight[3] = 0
        plain, least = (
            (Int(bits, granularity, symmetric, name).encode(weight).decode() - weight).double().square().sum().item()
            for name in ("minmax", "mse")
        )
        assert least <= plain * (1 + 1e-5) + 1e-12


@each_symmetric
def test_least_squares_are_clearly_better_where_tails_are_thin(symmetric):
    weight = torch.randn(16, 1024)
    plain, least = (
        (Int(3, "channel", symmetric, name).encode(weight).decode() - weight).square().sum()
        for name in ("minmax", "mse")
    )
    assert least < 0.7 * plain


@pytest.mark.parametrize("n", [1, 3, 999, 12345, 30001])
@pytest.mark.parametrize("kind", ["normal", "heavy", "relu"])
def test_percentile_equals_sorting(n, kind):
    values = {"normal": torch.randn(n), "heavy": torch.randn(n) ** 5, "relu": torch.randn(n).relu()}[kind]
    magnitudes = np.sort(np.abs(values.numpy()))
    limit = next(m for i, m in enumerate(magnitudes) if i + 1 >= 0.9999 * n)  # the least that keeps 99.99 %
    low, high = find_range(values, 8, False, "percentile")
    assert low.item() == max(min(values.min().item(), 0), -limit)
    assert high.item() == min(max(values.max().item(), 0), limit)
    assert (values.abs() <= max(-low, high)).float().mean() >= 0.9999
    if n > 20000 and kind != "relu":
        assert max(-low, high) < magnitudes[-1]


@pytest.mark.parametrize("method", ["percentile", "histogram", "mse"])
def test_an_outlier_is_cut_off(method):
    values = torch.cat([torch.randn(40_000), torch.tensor([12.0])])
    low, high = find_range(values, 4, False, method)
    assert high < 6
    assert low < -1


@each_method
@pytest.mark.parametrize("bits", [2, 5, 8])
@each_symmetric
def test_ranges_hold_zero_and_stay_within_the_values(method, bits, symmetric):
    for name, make in ROWS.items():
        values = make()
        low, high = find_range(values, bits, symmetric, method)
        whole = find_range(values, bits, symmetric)
        assert whole[0] * (1 + 1e-6) <= low <= 0 <= high <= whole[1] * (1 + 1e-6), name
        assert low.shape == high.shape == ()
        scale, zero = affine_grid(low, high, bits, symmetric)
        assert scale > 0 and zero == zero.round() and 0 <= zero < 2**bits, name
        assert round_trip(torch.zeros(1), scale, zero, bits).item() == 0, name


@each_method
@pytest.mark.parametrize("bits", [2, 4, 8])
@each_symmetric
def test_constant_rows_are_exact(method, bits, symmetric):
    weight = torch.tensor([0.0, 0.3, -0.3, 1e-30, -1e30])[:, None].expand(5, 10)
    decoded = Int(bits, "channel", symmetric, method).encode(weight).decode()
    torch.testing.assert_close(decoded, weight, rtol=2e-6, atol=0)


@each_method
@each_symmetric
def test_every_row_has_a_range_of_its_own(method, symmetric):
    """Whatever is beside it: a row of both signs beside rows of one, an outlier, zeros."""
    rows = [make().repeat(777)[:777] for make in ROWS.values()]
    rows.append(torch.cat([torch.rand(776), torch.tensor([12.0])]))
    for bits in (4, 8):
        together = find_range(torch.stack(rows).view(3, 4, 777), bits, symmetric, method)
        for i, row in enumerate(rows):
            alone = find_range(row, bits, symmetric, method)
            assert [end.view(-1)[i].item() for end in together] == [end.item() for end in alone], (bits, i)


@each_method
@each_symmetric
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
def test_counts_equal_repetition(method, symmetric, kind):
    values, counts = ROWS[kind](), torch.randint(1, 60, (777,))
    repeated = find_range(values.repeat_interleave(counts), 4, symmetric, method)
    counted = find_range(values, 4, symmetric, method, counts.float())
    np.testing.assert_allclose(counted, repeated, rtol=1e-6)
    rows = find_range(torch.stack([values, values]), 4, symmetric, method, torch.stack([counts, counts]).float())
    for end, other in zip(rows, counted, strict=True):
        np.testing.assert_allclose(end, other.expand(2), rtol=1e-6)


@each_method
@pytest.mark.parametrize("power", [-90, -20, 20, 90])
def test_ranges_scale_with_the_values(method, power):
    values = torch.randn(3, 500) ** 3
    expected = torch.stack(find_range(values, 4, False, method)).double() * 2.0**power
    size = 2.0**power if method != "mse" else 2.0 ** (power / 3 // 1)  # its squares leave float32
    got = torch.stack(find_range(values * size, 4, False, method)).double() * (2.0**power / size)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["minmax", "percentile", "histogram"])
@each_symmetric
def test_ranges_do_not_prefer_a_sign(method, symmetric):
    values = torch.randn(4, 600) ** 3
    values[1] = values[1].abs()
    low, high = find_range(values, 8, symmetric, method)
    turned = find_range(-values, 8, symmetric, method)
    assert torch.equal(-turned[1], low) and torch.equal(-turned[0], high)


def test_a_symmetric_grid_of_one_sided_values_has_half_the_levels():
    """So it is cut where the same values of both signs are: no more of its levels are on the side that is used."""
    values = torch.cat([torch.rand(20_000), torch.tensor([12.0])])
    one_sided, both = (find_range(v, 8, True, "histogram")[1] for v in (values, torch.cat([values, -values])))
    assert one_sided == both
    assert find_range(values, 8, False, "histogram")[1] != both  # an asymmetric grid spends all of its levels on it


def test_values_far_from_zero_are_cut_by_divergence_too():
    """Nothing is in the narrowest ranges that are tried; they must not end the search."""
    values = torch.cat([10 + torch.randn(20_000), torch.tensor([40.0])])
    assert 12 < find_range(values, 4, False, "histogram")[1] < 20


def test_names_are_checked():
    for name in [*METHODS, "ema"]:
        check_range(name)
    with pytest.raises(ValueError, match=r"range must be one of minmax, ema, .*got 'kl'"):
        check_range("kl")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_keeps_the_dtype_and_rounds_in_float32(dtype):
    values = torch.randn(3, 40).to(dtype)
    scale, zero = (part[:, None] for part in affine_grid(*find_range(values.float(), 6, False), 6, False))
    codes = np.clip(np.rint(values.float().numpy() / scale.numpy()) + zero.numpy(), 0, 63)
    expected = torch.from_numpy((codes - zero.numpy()) * scale.numpy()).to(dtype)
    got = round_trip(values, scale, zero, 6)
    assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_method
def test_a_fitted_weight_of_another_dtype_equals_that_of_float32(method, dtype):
    weight = torch.randn(5, 30).to(dtype)
    packed, expected = Int(4, range=method).encode(weight), Int(4, range=method).encode(weight.float())
    assert torch.equal(packed.codes, expected.codes) and torch.equal(packed.scale, expected.scale)
    assert packed.decode().dtype == dtype


@pytest.mark.parametrize("method", ["mse", "percentile", "histogram"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:10"])
def test_a_fitted_grid_stays_while_the_weight_moves_and_what_leaves_it_has_no_gradient(method, granularity):
    scheme = Int(3, granularity, range=method)
    weight = nn.Parameter(torch.randn(6, 20))
    noise, generator = WeightNoise(weight, scheme), torch.Generator().manual_seed(0)
    noise.draw(weight, 1.0, generator)
    fitted = noise.target
    scale, zero = (t.reshape(*fitted.scale.shape, 1).double() for t in (fitted.scale, fitted.zeros))
    with torch.no_grad():
        weight.mul_(2)
    noise.draw(weight, 1.0, generator)
    assert noise.target is fitted
    groups = weight.detach().reshape(*fitted.scale.shape, -1).double()
    expected = (((groups / scale).round() + zero).clamp(0, 7) - zero) * scale
    noisy = noise.apply(weight)
    torch.testing.assert_close(noisy, expected.view_as(weight).float())
    outer = torch.randn(6, 20)
    noisy.backward(outer)
    inside = ((groups >= (0 - zero) * scale) & (groups <= (7 - zero) * scale)).view_as(weight)
    assert 0 < inside.float().mean() < 1
    assert torch.equal(weight.grad, outer * inside)
    taken = fitted.take(weight)  # what LatentWeight packs: the value that training saw
    assert torch.equal(taken.decode(), noisy)


def test_a_minmax_grid_follows_the_weight():
    weight = nn.Parameter(torch.randn(4, 6))
    noise = WeightNoise(weight, Int(3))
    noise.draw(weight, 1.0, torch.Generator())
    with torch.no_grad():
        weight.mul_(3)
    noisy = noise.apply(weight)
    assert torch.equal(noisy, Int(3).encode(weight.detach()).decode())
    noisy.sum().backward()
    assert torch.equal(weight.grad, torch.ones(4, 6))
