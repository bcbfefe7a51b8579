"""Convolutions in integers against `F.conv2d` in float64, from the definition of the grids."""

import pytest
import torch
import torch.nn.functional as F

from lightning_qnoise.ops import has_int8, int8_conv, int8_conv2d, int8_kernel, prepare_grid, prepare_int8

pytestmark = pytest.mark.skipif(not has_int8("cpu"), reason="this processor saturates int8 products")
each_symmetric = pytest.mark.parametrize("symmetric", [False, True])
each_grid = pytest.mark.parametrize("per", ["tensor", "sample"])


def make_kernel(shape, symmetric=False, bits=8):
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    scale = torch.rand(shape[0], 1) / 100 + 0.001
    zero_point = None if symmetric else torch.randint(2**bits, (shape[0], 1), dtype=torch.uint8)
    return codes, scale, zero_point


def make_grid(x, per, bits=8):
    dims = (0, 1, 2, 3) if per == "tensor" else (1, 2, 3)
    low, high = x.float().amin(dims, per == "sample").clamp(max=0), x.float().amax(dims, per == "sample").clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round()


def check(
    x, kernel, bias, grid, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), x_bits=8, bits=8, tolerance=2e-7
):
    codes, scale, zero_point = kernel
    weight = prepare_int8(int8_kernel(codes), scale, zero_point, bits)
    actual = int8_conv2d(
        x, weight, bias, prepare_grid(weight, *grid, x_bits), codes.shape[2:], stride, padding, dilation
    )
    x_codes = (x.float() / grid[0] + grid[1]).round().clamp(0, 2**x_bits - 1)
    values = F.pad((x_codes.double() - grid[1]) * grid[0].double(), padding)
    zero = 2 ** (bits - 1) if zero_point is None else zero_point.double()[:, :, None, None]
    dense = (codes.double() - zero) * scale.double()[:, :, None, None]
    expected = F.conv2d(values, dense, None if bias is None else bias.double(), stride, 0, dilation)
    largest = (2**bits - 1) * (2**x_bits - 1) * codes[0].numel() * scale.max() * grid[0].max()
    assert actual.dtype == x.dtype and actual.shape == expected.shape
    if actual.numel():
        assert (actual - expected).abs().max() <= tolerance * largest.double()
    return actual


@each_symmetric
@each_grid
@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), {}),
        ((2, 3, 5, 7), (4, 3, 3, 3), {"padding": (1, 1, 1, 1)}),
        ((3, 8, 9, 6), (5, 8, 3, 2), {"stride": (2, 1), "padding": (0, 1, 2, 0)}),
        ((2, 4, 11, 11), (7, 4, 3, 5), {"dilation": (3, 2), "padding": (4, 4, 3, 3)}),
        ((4, 16, 8, 8), (33, 16, 1, 1), {"stride": (2, 2)}),
        ((5, 2, 1, 40), (3, 2, 1, 9), {"stride": (1, 3), "padding": (4, 4, 0, 0)}),
    ],
    ids=str,
)
def test_it_is_the_convolution_of_the_quantized_values(shape, kernel, geometry, symmetric, per):
    x = torch.randn(shape) * 3 + 1
    check(x, make_kernel(kernel, symmetric), torch.randn(kernel[0]), make_grid(x, per), **geometry)
    check(x, make_kernel(kernel, symmetric), None, make_grid(x, per), **geometry)


@each_symmetric
@each_grid
@pytest.mark.parametrize("bytes_", [1, 700, 5000])
def test_slices_are_the_whole(bytes_, per, symmetric, monkeypatch):
    monkeypatch.setattr(int8_conv, "_SLICE", bytes_)  # a row, some rows, some samples at a time
    x = torch.randn(7, 5, 9, 8)
    check(x, make_kernel((6, 5, 3, 3), symmetric), torch.randn(6), make_grid(x, per), padding=(1, 1, 1, 1))


def test_whole_numbers_come_out_exactly():
    x, kernel = torch.randint(256, (3, 9, 6, 6)).float(), make_kernel((8, 9, 3, 3))
    kernel = kernel[0], torch.ones(8, 1), kernel[2]
    for grid in [(torch.tensor(1.0), torch.tensor(0.0)), (torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))]:
        check(x, kernel, None, grid, padding=(1, 1, 1, 1), tolerance=0)


@pytest.mark.parametrize(("bits", "x_bits"), [(2, 8), (4, 4), (8, 2)])
@each_grid
def test_fewer_bits(bits, x_bits, per):
    x = torch.randn(2, 4, 6, 6)
    grid = make_grid(x, per, x_bits)
    check(x, make_kernel((5, 4, 3, 3), bits=bits), None, grid, padding=(1, 1, 1, 1), bits=bits, x_bits=x_bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_grid
def test_the_output_has_the_dtype_of_the_input(dtype, per):
    x, bias = torch.randn(2, 4, 6, 6).to(dtype), torch.randn(5).to(dtype)
    tolerance = 2e-7 + torch.finfo(dtype).eps / 50
    check(x, make_kernel((5, 4, 3, 3)), bias, make_grid(x, per), tolerance=tolerance)


@each_grid
def test_layouts_of_memory(per):
    kernel = make_kernel((5, 4, 3, 3))
    for x in (
        torch.randn(3, 4, 6, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 6, 4, 3).permute(3, 2, 0, 1),
        torch.randn(3, 8, 6, 12)[:, ::2, :, ::2],
        torch.randn(1, 4, 6, 6).expand(3, 4, 6, 6),
    ):
        y = check(x, kernel, None, make_grid(x, per))
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def test_nothing_and_a_gradient():
    kernel = make_kernel((5, 4, 3, 3))
    grid = torch.tensor(0.1), torch.tensor(3.0)
    assert check(torch.randn(0, 4, 6, 6), kernel, None, grid).shape == (0, 5, 4, 4)
    assert not check(torch.randn(1, 4, 6, 6, requires_grad=True), kernel, None, grid).requires_grad


def test_what_does_not_fit_is_refused():
    kernel, grid = make_kernel((5, 4, 3, 3)), (torch.tensor(0.1), torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"the kernel reaches over \[3, 3\], more than the padded input \[2, 6\]"):
        check(torch.randn(1, 4, 2, 6), kernel, None, grid)
    with pytest.raises(ValueError, match="a kernel of 36 inputs cannot read windows of 27"):
        check(torch.randn(1, 3, 6, 6), kernel, None, grid)
    with pytest.raises(ValueError, match="different shapes"):
        prepare_grid(prepare_int8(int8_kernel(kernel[0]), *kernel[1:]), grid[0], torch.ones(2))
