import numpy as np
import pytest
import torch

from lightning_qnoise.ops.affine import affine_steps
from lightning_qnoise.ops.int8_codes import _rounder, byte_codes, quantized_images

EACH = pytest.mark.parametrize(("bits", "middle"), [(8, 128), (8, 0), (4, 8), (4, 0), (2, 2)])


def reference(x, scale, zero_point, bits, middle):
    """In NumPy: of the numbers times 1 / scale, which float64 holds exactly."""
    steps = np.rint(x.float().double().numpy() * float(np.float32(1 / scale)))
    codes = np.clip(steps + zero_point, 0, 2**bits - 1) - middle
    return torch.from_numpy(codes.astype(np.int64).astype(np.uint8).view(np.int8))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1001), (2, 3, 5, 4)])
def test_codes_of_one_scale(shape, dtype, bits, middle):
    x = (torch.randn(shape) * 3).to(dtype)
    for scale in (0.0371, 1.7):
        for zero_point in (0, 2 ** (bits - 1), 2**bits - 1):
            codes = byte_codes(x, torch.tensor(scale), zero_point - middle, bits, middle)
            assert torch.equal(codes, reference(x, np.float32(scale), zero_point, bits, middle))


@EACH
def test_a_scale_for_each_row(bits, middle):
    x, scale = torch.randn(40, 33) * 2, torch.rand(40, 1) / 20 + 0.01
    for zero_point in (2 ** (bits - 1), torch.randint(2**bits, (40, 1)).float()):
        expected = affine_steps(x, scale, torch.as_tensor(zero_point), bits) + zero_point - middle
        codes = byte_codes(x, scale, zero_point - middle, bits, middle)
        assert torch.equal(codes, expected.long().to(torch.uint8).view(torch.int8))


@pytest.mark.parametrize("zero_point", [0, 1, 2, 127, 128])
def test_halves_go_to_the_even_number_before_the_zero_point_is_added(zero_point):
    x, expected = torch.arange(-7, 8) / 4, torch.arange(-7, 8).double().div(2).round()
    codes = byte_codes(x, torch.tensor(0.5), zero_point, middle=0).view(torch.uint8)
    assert torch.equal(codes, (expected + zero_point).clamp(0, 255).to(torch.uint8))


def test_one_number_and_one_scale_are_what_tensors_are_but_for_ties():
    x, scale = torch.randn(10**6) * 2, torch.tensor(0.0173)
    number, tensor = (byte_codes(x, scale, offset) for offset in (3, torch.tensor(3.0)))
    distance = (number.int() - tensor).abs()
    assert distance.max() <= 1 and distance.sum() < 50


@pytest.mark.parametrize("offset", [-128, 4, 5])
def test_what_is_too_large_is_clamped(offset):
    x = torch.tensor([-torch.inf, -3e38, -1e6, 1e6, 3e38, torch.inf])
    assert byte_codes(x, torch.tensor(1e-3), offset).tolist() == [-128] * 3 + [127] * 3


@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16])
def test_defaults_of_torch_do_not_matter(default):
    x, scale = torch.randn(50), torch.tensor(0.02)
    expected = byte_codes(x, scale, 4)
    _rounder.cache_clear()
    if default == "meta":
        with torch.device("meta"):
            found = byte_codes(x, scale, 4)
    else:
        torch.set_default_dtype(default)
        try:
            found = byte_codes(x, scale, 4)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_layouts_of_memory_stay():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for offset in (3, torch.tensor(3.0)):
        codes = byte_codes(x, torch.tensor(0.02), offset)
        assert codes.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(codes, byte_codes(x.contiguous(), torch.tensor(0.02), offset))
    every_other = torch.randn(6, 8)[::2, ::2]
    assert torch.equal(
        byte_codes(every_other, torch.tensor(0.02), 3), byte_codes(every_other.clone(), torch.tensor(0.02), 3)
    )


@pytest.mark.parametrize("border", [(0, 0, 0, 0), (1, 2, 0, 3)])
@pytest.mark.parametrize("zero_point", [0, 77, "each"])
def test_images(zero_point, border):
    x, scale = torch.randn(2, 3, 5, 4), torch.tensor(0.031)
    if zero_point == "each":
        scale, zero_point = torch.tensor([0.02, 0.03]).view(2, 1, 1, 1), torch.tensor([5.0, 99.0]).view(2, 1, 1, 1)
    images = quantized_images(x, scale, zero_point, 8, border)
    assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(x, border)  # zeros are code zero_point
    expected = affine_steps(padded, scale, torch.as_tensor(zero_point), 8) + zero_point
    assert torch.equal(images.float(), expected)
