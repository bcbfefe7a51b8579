from itertools import pairwise

import numpy as np
import pytest
import torch
from references import int_reference

from lightning_qnoise import Int
from lightning_qnoise.schemes.bits import unpack_bits
from lightning_qnoise.schemes.ranges import affine_grid, affine_round

GRANULARITIES = ["tensor", "channel", "group:6"]
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
each_bits = pytest.mark.parametrize("bits", range(2, 9))
each_symmetric = pytest.mark.parametrize("symmetric", [False, True])


def codes_of(packed):
    return unpack_bits(packed.codes, packed.scheme.bits, packed.shape.numel()).numpy()


@each_bits
@each_granularity
@each_symmetric
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(10, 24),
        lambda: torch.rand(10, 24) + 3,  # the range must be widened down to zero
        lambda: -torch.rand(5, 4, 3, 2) - 3,  # and up
        lambda: torch.randint(-4, 5, (10, 24)) * 0.5,  # ties between two levels
    ],
    ids=["normal", "positive", "negative-conv", "ties"],
)
def test_codes_and_values_equal_numpy(bits, granularity, symmetric, make):
    weight = make()
    packed = Int(bits, granularity, symmetric).encode(weight)
    codes, scale, zero, decoded = int_reference(weight.numpy(), bits, granularity, symmetric)
    np.testing.assert_array_equal(codes_of(packed), codes.flatten())
    np.testing.assert_array_equal(packed.scale, scale)
    if symmetric:
        assert packed.zero_point is None
    else:
        np.testing.assert_array_equal(packed.zero_point, zero)
    np.testing.assert_array_equal(packed.decode(), decoded)
    np.testing.assert_array_equal(packed.project(weight), decoded)  # what noise puts in


@pytest.mark.parametrize("zero", [2, 3, torch.tensor(2.0), torch.tensor(3.0)])
def test_rounding_is_half_to_even_before_the_zero_point_as_in_onnx(zero):
    codes = affine_round(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0), zero, bits=4)
    assert codes.tolist() == [value + float(zero) for value in (0, 2, 2, 0, -2)]


def test_values_outside_the_range_take_the_end_value():
    scale, zero = affine_grid(torch.tensor(-1.0), torch.tensor(2.5), bits=3, symmetric=False)
    assert (scale, zero) == (0.5, 2)
    codes = affine_round(torch.tensor([-1e9, -1.0, 0.0, 2.5, 1e9]), scale, zero, bits=3)
    assert codes.tolist() == [0, 0, 2, 7, 7]


@each_granularity
@each_symmetric
def test_error_falls_as_bits_grow(granularity, symmetric):
    weight = torch.randn(64, 96)
    errors = [(Int(b, granularity, symmetric).encode(weight).decode() - weight).square().mean() for b in range(2, 9)]
    assert all(after < before for before, after in pairwise(errors))
    # a uniform error within +-scale/2 has the variance scale**2 / 12
    scale = Int(8, granularity, symmetric).encode(weight).scale
    assert errors[-1] == pytest.approx(scale.square().mean().item() / 12, rel=0.2)


@each_bits
@each_granularity
@each_symmetric
def test_zero_is_exact_and_levels_are_few(bits, granularity, symmetric):
    weight = torch.rand(12, 96) + 0.3
    weight[:, ::7] = 0
    weight[3] = 0
    packed = Int(bits, granularity, symmetric).encode(weight)
    decoded = packed.decode()
    assert (decoded[weight == 0] == 0).all()
    for group in decoded.view(packed.scale.numel(), -1):
        assert len(group.unique()) <= 2**bits


@each_bits
@each_granularity
@each_symmetric
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-30, -1e-30, 1e-45, 3e38, -3e38])
def test_constant_weights(bits, granularity, symmetric, value):
    weight = torch.full((4, 12), value)
    decoded = Int(bits, granularity, symmetric).encode(weight).decode()
    if abs(value) < 1e-37:  # the scale itself underflows: nothing but zero is left, and nothing but finite numbers
        assert decoded.abs().max() <= abs(value)
    else:
        torch.testing.assert_close(decoded, weight, rtol=1e-6, atol=0)


@each_symmetric
@pytest.mark.parametrize("size", [1e-30, 1e36])
def test_tiny_and_huge_weights_equal_scaled_ones(symmetric, size):
    weight = torch.randn(8, 16).clamp(-3, 3)
    plain, scaled = Int(4, symmetric=symmetric).encode(weight), Int(4, symmetric=symmetric).encode(weight * size)
    same = codes_of(plain) == codes_of(scaled)
    assert same.mean() > 0.98  # ties may break differently
    np.testing.assert_allclose(
        scaled.decode().flatten().double().numpy()[same] / size, plain.decode().flatten().numpy()[same], rtol=1e-5
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_cannot_be_represented_is_refused(value):
    weight = torch.randn(4, 4, dtype=torch.float64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"overflow torch\.float64 as Int"):
        Int().encode(weight)


def test_a_level_beyond_the_largest_float_is_refused():
    weight = torch.tensor([[-3e38, 3e38, 0.0]])
    assert torch.isfinite(Int(8).encode(weight).decode()).all()
    with pytest.raises(ValueError, match="overflow"):  # zero on the grid moves the lowest of four levels to -4e38
        Int(2).encode(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_go_through_float32(dtype):
    weight = torch.randn(6, 18).to(dtype)
    packed = Int(5).encode(weight)
    reference = int_reference(weight.float().numpy(), 5, "channel", False)[3]
    assert packed.scale.dtype == torch.float32
    assert torch.equal(packed.decode(), torch.from_numpy(reference).to(dtype))


def test_layout_in_memory_does_not_matter():
    weight = torch.randn(6, 4, 3, 3)
    expected = Int(6).encode(weight)
    turned = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for other in (weight.to(memory_format=torch.channels_last), turned):
        assert not other.is_contiguous()
        packed = Int(6).encode(other)
        assert torch.equal(packed.codes, expected.codes)
        assert torch.equal(packed.decode(), expected.decode())


def test_default_dtype_changes_nothing():
    weight = torch.randn(4, 8)
    expected = Int().encode(weight)
    torch.set_default_dtype(torch.float64)
    try:
        assert Int().empty((4, 8)).scale.dtype == torch.float32
        assert torch.equal(Int().encode(weight).decode(), expected.decode())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"bits": 9}, {"granularity": "row"}, {"granularity": "group:0"}, {"granularity": "group:8x"}],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="Int expects"):
        Int(**options)


def test_group_that_does_not_divide_names_the_remedy():
    with pytest.raises(ValueError, match=r"rows of 10 elements .* pick a divisor of 10"):
        Int(granularity="group:4").encode(torch.randn(3, 10))
    with pytest.raises(ValueError, match="fewer than two dimensions"):
        Int().encode(torch.randn(10))
