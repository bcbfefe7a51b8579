"""GPTQ against the update of the paper with an explicit inverse, and against what it is for."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qnoise import Int, quantize
from lightning_qnoise.schemes.bits import unpack_bits
from lightning_qnoise.schemes.gptq import compensated_codes
from lightning_qnoise.schemes.ranges import affine_decode, affine_grid, affine_round, find_range

GRANULARITIES = ["tensor", "channel", "group:5", "group:20"]


def grid_of(weight, bits, granularity="channel", symmetric=False):
    """Scale and zero point of every element."""
    rows, cols = weight.shape
    size = {"tensor": rows * cols, "channel": cols}.get(granularity) or int(granularity.split(":")[1])
    groups = weight.reshape(-1, size)
    parts = affine_grid(*find_range(groups, bits, symmetric), bits, symmetric)
    return [part[:, None].expand_as(groups).reshape(rows, cols) for part in parts]


def slow_gptq(weight, scale, zero, bits, moment):
    """Frantar et al. 2023, eq. 2 and 3: after each column, the inverse of the Hessian of the free ones anew."""
    weight, scale, zero, moment = (np.asarray(part).astype(np.float64) for part in (weight, scale, zero, moment))
    damped = moment + np.diag(np.where(np.diag(moment) > 0, 0.01 * np.diag(moment).mean(), 1.0))
    free, codes = weight.copy(), np.empty_like(weight)
    for j in range(weight.shape[1]):
        inverse = np.linalg.inv(damped[j:, j:])  # of what is left: j is its first
        codes[:, j] = np.clip(np.rint(free[:, j] / scale[:, j]) + zero[:, j], 0, 2**bits - 1)
        error = (free[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / inverse[0, 0]
        free[:, j:] -= np.outer(error, inverse[0])
    return codes


def output_error(weight, codes, scale, zero, moment):
    """The mean of `|| (weight - decoded) x ||^2` over the inputs of that moment."""
    difference = (weight - affine_decode(codes, scale, zero)).double()
    return torch.einsum("ij,jk,ik->", difference, moment.double(), difference).item()


def correlated(cols, n=400, rank=6):
    """The second moment of inputs that mostly lie in a few directions."""
    x = torch.randn(n, rank) @ torch.randn(rank, cols) + 0.1 * torch.randn(n, cols)
    return x.mT @ x / n


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_identity_as_moment_is_plain_rounding(bits, granularity, symmetric):
    weight = torch.randn(7, 60)
    scale, zero = grid_of(weight, bits, granularity, symmetric)
    codes = compensated_codes(weight, scale, zero, bits, 3.0 * torch.eye(60))
    assert torch.equal(codes, affine_round(weight, scale, zero, bits))
    packed = Int(bits, granularity, symmetric, rounding="gptq").encode(weight, moment=torch.eye(60))
    assert torch.equal(packed.codes, Int(bits, granularity, symmetric).encode(weight).codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("cols", [1, 5, 64, 65, 150])
def test_codes_equal_the_slow_algorithm(bits, cols):
    weight, moment = torch.randn(6, cols), correlated(cols)
    scale, zero = grid_of(weight, bits)
    codes = compensated_codes(weight, scale, zero, bits, moment)
    assert codes.shape == weight.shape and torch.equal(codes, codes.round().clamp(0, 2**bits - 1))
    expected = torch.from_numpy(slow_gptq(weight, scale, zero, bits, moment)).float()
    agree = (codes == expected).float().mean(dim=1)  # a tie that breaks otherwise changes the rest of its row
    assert agree.median() == 1
    fast, slow = (output_error(weight, c, scale, zero, moment) for c in (codes, expected))
    assert fast == pytest.approx(slow, rel=0.1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_encode_equals_the_slow_algorithm(granularity, symmetric):
    weight, moment = torch.randn(6, 4, 5, 3), correlated(60)
    packed = Int(4, granularity, symmetric, rounding="gptq").encode(weight, moment=moment)
    scale, zero = grid_of(weight.flatten(1), 4, granularity, symmetric)
    expected = slow_gptq(weight.flatten(1), scale, zero, 4, moment)
    got = unpack_bits(packed.codes, 4, 360).view(6, 60).numpy()
    assert np.median((got == expected).mean(axis=1)) == 1
    decoded = affine_decode(torch.from_numpy(got), scale, zero).view_as(weight)
    assert torch.equal(packed.decode(), decoded)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_changes_clearly_less_on_correlated_inputs(bits):
    weight, moment = torch.randn(32, 96), correlated(96)
    scale, zero = grid_of(weight, bits)
    codes = compensated_codes(weight, scale, zero, bits, moment)
    nearest = affine_round(weight, scale, zero, bits)
    assert output_error(weight, codes, scale, zero, moment) < 0.35 * output_error(weight, nearest, scale, zero, moment)


def test_the_output_changes_hardly_more_on_any_inputs():
    sums = np.zeros(2)
    for case in range(60):
        torch.manual_seed(case)
        bits, rows, cols = 2 + case % 7, 8 + case % 5, 3 + 7 * (case % 11)
        weight = torch.randn(rows, cols) ** (1 + 2 * (case % 2))
        moment = correlated(cols, n=2 * cols + 1, rank=1 + case % 9)
        scale, zero = grid_of(weight, bits)
        codes = compensated_codes(weight, scale, zero, bits, moment)
        nearest = affine_round(weight, scale, zero, bits)
        got, plain = (output_error(weight, c, scale, zero, moment) for c in (codes, nearest))
        assert got <= 1.25 * plain, case  # it is greedy
        sums += got, plain
    assert sums[0] < 0.5 * sums[1]


def test_every_group_has_its_own_moment():
    weight, moments = torch.randn(12, 20), torch.stack([correlated(20) for _ in range(3)])
    scale, zero = grid_of(weight, 3)
    together = compensated_codes(weight, scale, zero, 3, moments)
    for g in range(3):
        rows = slice(4 * g, 4 * g + 4)
        alone = compensated_codes(weight[rows], scale[rows], zero[rows], 3, moments[g])
        assert torch.equal(together[rows], alone)
    assert not torch.equal(together, compensated_codes(weight, scale, zero, 3, moments[0]))


def test_inputs_that_are_always_zero_leave_the_others_as_they_are():
    weight, moment = torch.randn(6, 30), correlated(30)
    dead = torch.zeros(30, dtype=torch.bool)
    dead[[0, 7, 29]] = True
    moment[dead], moment[:, dead] = 0, 0
    scale, zero = grid_of(weight, 4)
    codes = compensated_codes(weight, scale, zero, 4, moment)
    assert torch.equal(codes[:, dead], affine_round(weight, scale, zero, 4)[:, dead])
    expected = slow_gptq(weight, scale, zero, 4, moment)
    assert np.median((codes.numpy() == expected).mean(axis=1)) == 1
    all_dead = compensated_codes(weight, scale, zero, 4, torch.zeros(30, 30))
    assert torch.equal(all_dead, affine_round(weight, scale, zero, 4))


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e4, 1e12])
def test_the_size_of_the_inputs_does_not_matter(size):
    weight, moment = torch.randn(6, 40), correlated(40)
    scale, zero = grid_of(weight, 4)
    expected = compensated_codes(weight, scale, zero, 4, moment)
    got = compensated_codes(weight, scale, zero, 4, moment * size)
    assert (got == expected).float().mean(dim=1).median() == 1


def test_a_moment_of_a_single_input_can_be_inverted():
    x, weight = torch.randn(1, 50), torch.randn(4, 50)
    scale, zero = grid_of(weight, 3)
    codes = compensated_codes(weight, scale, zero, 3, x.mT @ x)
    nearest = affine_round(weight, scale, zero, 3)
    got, plain = (((weight - affine_decode(c, scale, zero)) @ x.mT).square().sum() for c in (codes, nearest))
    assert got < 0.1 * plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_go_through_float32(dtype):
    weight, moment = torch.randn(5, 40).to(dtype), correlated(40)
    scheme = Int(4, rounding="gptq")
    packed, expected = scheme.encode(weight, moment=moment), scheme.encode(weight.float(), moment=moment)
    assert torch.equal(packed.codes, expected.codes)
    assert packed.decode().dtype == dtype
    kept = weight.clone()
    scheme.encode(weight, moment=moment)
    assert torch.equal(weight, kept)


def test_without_a_moment_rounding_is_plain():
    weight = torch.randn(5, 40)
    assert torch.equal(Int(4, rounding="gptq").encode(weight).codes, Int(4).encode(weight).codes)
    nearest = Int(4).encode(weight, moment=correlated(40))  # looks at no moment
    assert torch.equal(nearest.codes, Int(4).encode(weight).codes)


@pytest.mark.parametrize(
    "moment",
    [
        torch.eye(39),
        torch.eye(40)[:, :39],
        torch.ones(40),
        torch.full((40, 40), torch.nan),
        torch.diag(torch.full((40,), torch.inf)),
        torch.eye(40).expand(4, 40, 40).clone(),  # four groups of six rows
    ],
    ids=["small", "not-square", "vector", "nan", "inf", "groups"],
)
def test_a_moment_that_does_not_fit_is_refused(moment):
    with pytest.raises(ValueError):
        Int(4, rounding="gptq").encode(torch.randn(6, 40), moment=moment)


@pytest.mark.parametrize("range_", ["mse", "percentile", "histogram"])
def test_it_works_on_any_range(range_):
    weight, moment = torch.randn(8, 60), correlated(60)
    got, plain = (
        Int(3, range=range_, rounding=rounding).encode(weight, moment=moment) for rounding in ("gptq", "nearest")
    )
    assert torch.equal(got.scale, plain.scale) and torch.equal(got.zero_point, plain.zero_point)
    errors = [((weight - p.decode()).double() @ moment.double() * (weight - p.decode())).sum() for p in (got, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_a_layer_is_better_on_inputs_that_calibration_has_not_seen():
    mixing = torch.randn(6, 48)
    batches = [torch.randn(50, 6) @ mixing + 0.05 * torch.randn(50, 48) for _ in range(5)]
    layer = nn.Linear(48, 24)
    errors = {}
    for rounding in ("nearest", "gptq"):
        model = nn.Sequential(nn.Linear(48, 24))
        model.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias})
        packed = quantize(model, Int(3, rounding=rounding), loader=batches[:4])
        errors[rounding] = (packed(batches[4]) - layer(batches[4])).square().mean().item()
    assert errors["gptq"] < 0.3 * errors["nearest"]
