"""Convolutions in integers against `F.conv2d` in float64, from the definition of the grids."""

import pytest
import torch
import torch.nn.functional as F

from lightning_qnoise.ops import int8_backend, int8_conv2d, prepare_int8_conv2d

pytestmark = pytest.mark.skipif(int8_backend("cpu") != "onednn", reason="this processor has no exact int8 kernels")
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
    zero_point = (-low / scale).round()
    return scale, zero_point if scale.ndim else int(zero_point)


def check(
    x,
    kernel,
    bias,
    grid,
    stride=(1, 1),
    padding=(0, 0, 0, 0),
    dilation=(1, 1),
    x_bits=8,
    bits=8,
    tolerance=2e-7,
    is_unsigned=False,
):
    codes, scale, zero_point = kernel
    prepared = prepare_int8_conv2d(codes, scale, zero_point, bits, x.shape, stride, padding, dilation, is_unsigned)
    actual = int8_conv2d(x, prepared, bias, *grid, x_bits)
    if grid[0].ndim == 0 and isinstance(grid[1], int):
        steps = x.float().double() * (1 / grid[0].double()).float()  # exact
    else:
        steps = x.float() / grid[0]
    x_codes = (steps.round() + grid[1]).clamp(0, 2**x_bits - 1)
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
@pytest.mark.parametrize("bias", [None, torch.randn(6)], ids=["no bias", "bias"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (2, 2, 0, 0), (0, 1, 2, 1), (0, 0, 0, 0)], ids=str)
def test_inputs_without_a_negative_one_need_no_border(padding, bias, per, symmetric):
    x, kernel = torch.randn(3, 5, 7, 8).relu(), make_kernel((6, 5, 3, 2), symmetric)
    scale = make_grid(x, per)[0]
    for is_unsigned in (False, True):
        check(x, kernel, bias, (scale, 0), (2, 1), padding, is_unsigned=is_unsigned)


@each_symmetric
@each_grid
@pytest.mark.parametrize("n_out", [16, 48, 96, 130])
def test_more_outputs_than_a_register_holds(n_out, per, symmetric):
    for sizes in [(1, 20, 4, 4), (9, 20, 12, 12)]:
        x = torch.randn(sizes)
        check(x, make_kernel((n_out, 20, 3, 3), symmetric), torch.randn(n_out), make_grid(x, per), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_scale_that_is_known_before(symmetric):
    x, scale = torch.randn(2, 3, 5, 6), torch.tensor(0.03)
    codes, weight_scale, zero_point = kernel = make_kernel((7, 3, 3, 3), symmetric)
    geometry = (1, 1), (1, 1, 1, 1), (1, 1)
    known = prepare_int8_conv2d(codes, weight_scale, zero_point, 8, x.shape, *geometry, image_scale=scale)
    assert torch.equal(int8_conv2d(x, known, None, scale, 77), check(x, kernel, None, (scale, 77), *geometry))


@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
@each_symmetric
def test_the_border_counts_as_zero(zero_point, symmetric):
    x, grid = torch.rand(2, 3, 5, 5) - 0.5, (torch.tensor(0.01), zero_point)
    check(x, make_kernel((4, 3, 3, 3), symmetric), torch.randn(4), grid, padding=(2, 2, 2, 2))
    check(x, make_kernel((4, 3, 3, 3), symmetric), None, (grid[0].expand(2, 1, 1, 1), zero_point), padding=(2, 2, 2, 2))


def test_whole_numbers_come_out_exactly():
    x, kernel = torch.randint(256, (3, 9, 6, 6)).float(), make_kernel((8, 9, 3, 3))
    kernel = kernel[0], torch.ones(8, 1), kernel[2]
    for grid in [(torch.tensor(1.0), 0), (torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))]:
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
        torch.randn(3, 4, 6, 6),
    ):
        y = check(x, kernel, None, make_grid(x, per))
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def test_one_channel_is_contiguous():
    y = check(torch.randn(3, 1, 6, 6), make_kernel((5, 1, 3, 3)), None, (torch.tensor(0.02), 100))
    assert y.is_contiguous()


def test_no_gradient():
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    assert not check(x, make_kernel((5, 4, 3, 3)), None, (torch.tensor(0.1), 3)).requires_grad


def test_what_does_not_fit_is_refused():
    kernel, grid = make_kernel((5, 4, 3, 3)), (torch.tensor(0.1), 3)
    with pytest.raises(ValueError, match=r"the kernel reaches over \[3, 3\], more than the padded input \[2, 6\]"):
        prepare_int8_conv2d(*kernel, 8, torch.Size([1, 4, 2, 6]))
    with pytest.raises(ValueError, match="kernels of 4 channels cannot read images of 3"):
        prepare_int8_conv2d(*kernel, 8, torch.Size([1, 3, 6, 6]))
    with pytest.raises(ValueError, match="one scale per row, got 20 scales for 5 rows"):
        prepare_int8_conv2d(kernel[0], torch.ones(5, 4), None, 8, torch.Size([1, 4, 6, 6]))
    prepared = prepare_int8_conv2d(*kernel, 8, torch.Size([1, 4, 6, 6]))
    with pytest.raises(ValueError, match=r"packed for images \[1, 4, 6, 6\], got \[2, 4, 6, 6\]"):
        int8_conv2d(torch.randn(2, 4, 6, 6), prepared, None, *grid)
    prepared = prepare_int8_conv2d(*kernel, 8, torch.Size([1, 4, 6, 6]), padding=(1, 1, 1, 1), is_unsigned=True)
    with pytest.raises(ValueError, match="packed for images with zero point 0, got 3"):
        int8_conv2d(torch.randn(1, 4, 6, 6), prepared, None, *grid)
