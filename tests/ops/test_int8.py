import pytest
import torch
import torch.nn.functional as F
from processor import needs_int8

from lightning_qnoise.ops import int8_backend, prepare_grid, prepare_int8
from lightning_qnoise.ops import int8_linear as int8_linear_on

pytestmark = needs_int8
needs_onednn = pytest.mark.skipif(int8_backend("cpu") != "onednn", reason="oneDNN has no exact int8 kernels here")
BACKENDS = [pytest.param("onednn", marks=needs_onednn), "cublas", "int_mm"]
each_symmetric = pytest.mark.parametrize("symmetric", [False, True])
each_grid = pytest.mark.parametrize("grid", ["tensor", "token"])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def int8_linear(x, weight, bias, scale, zero_point, bits=8):
    return int8_linear_on(x, weight, bias, prepare_grid(weight, scale, zero_point, bits))


def make_weight(n_out, n_in, symmetric=False, per="channel", bits=8):
    n_scales = n_out if per == "channel" else 1
    codes = torch.randint(2**bits, (n_out, n_in), dtype=torch.uint8)
    scale = torch.rand(n_scales, 1) / 100 + 0.001
    zero_point = None if symmetric else torch.randint(2**bits, (n_scales, 1), dtype=torch.uint8)
    return codes, scale, zero_point


def make_grid(x, grid, bits=8):
    low, high = (x.min(), x.max()) if grid == "tensor" else (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero_point = (-low / scale).round()
    return scale, zero_point if scale.ndim else int(zero_point)


def reference(x, codes, scale, zero_point, bias, x_scale, x_zero_point, bits=8, x_bits=8):
    """In float64, from the definition; and the sum of the magnitudes, which bounds what rounding may do."""
    if x_scale.ndim == 0 and isinstance(x_zero_point, int):
        steps = x.float().double() * (1 / x_scale.double()).float()  # exact
    else:
        steps = x.float() / x_scale
    x_codes = (steps.round() + x_zero_point).clamp(0, 2**x_bits - 1)
    x = (x_codes.double() - x_zero_point) * x_scale.double()
    weight = (codes.double() - (2 ** (bits - 1) if zero_point is None else zero_point.double())) * scale.double()
    y = F.linear(x, weight, None if bias is None else bias.double())
    largest = (2**bits - 1) * (2**x_bits - 1) * codes.shape[1] * scale.max() * x_scale.max()
    return y, largest.double()


def check(backend, x, weight, bias, grid, bits=8, x_bits=8, tolerance=2e-7):
    actual = int8_linear(x, prepare_int8(*weight, bits, backend), bias, *grid, x_bits)
    expected, largest = reference(x, *weight, bias, *grid, bits, x_bits)
    assert actual.dtype == x.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * largest


@each_symmetric
@each_grid
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (4, 1, 7), (3, 5, 7), (1, 130, 33), (64, 128, 512), (17, 96, 10), (700, 300, 1)]
)
def test_int8_linear_is_the_product_of_the_quantized_values(backend, shape, symmetric, grid):
    rows, n_in, n_out = shape
    x = torch.randn(rows, n_in) * 3 + 1
    check(backend, x, make_weight(n_out, n_in, symmetric), torch.randn(n_out), make_grid(x, grid))
    check(backend, x, make_weight(n_out, n_in, symmetric, per="tensor"), None, make_grid(x, grid))


@each_symmetric
def test_whole_numbers_come_out_exactly(backend, symmetric):
    x = torch.randint(256, (40, 250)).float()
    codes, _, zero_point = make_weight(30, 250, symmetric)
    weight = codes, torch.ones(30, 1), zero_point
    for grid in [(torch.tensor(1.0), torch.tensor(0.0)), (torch.ones(40, 1), torch.zeros(40, 1))]:
        actual = int8_linear(x, prepare_int8(*weight, backend=backend), None, *grid)
        assert torch.equal(actual.double(), reference(x, *weight, None, *grid)[0])


@pytest.mark.parametrize("x_value", [0.0, 255.0])
@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("zero_point", [0, 255])
@pytest.mark.parametrize("n_in", [64, 60_000])
def test_extreme_codes_do_not_saturate(backend, x_value, code, zero_point, n_in):
    x = torch.full((2, n_in), x_value)
    codes = torch.full((8, n_in), code, dtype=torch.uint8)
    weight = codes, torch.ones(1), torch.tensor([zero_point], dtype=torch.uint8)
    for x_zero_point in (0.0, 255.0):
        check(backend, x, weight, None, (torch.tensor(1.0), torch.tensor(x_zero_point)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("x_bits", [4, 8])
@each_symmetric
def test_fewer_bits(backend, bits, x_bits, symmetric):
    x = torch.randn(9, 40)
    check(backend, x, make_weight(12, 40, symmetric, bits=bits), None, make_grid(x, "token", x_bits), bits, x_bits)


def test_values_off_a_static_grid_are_clamped(backend):
    x = torch.tensor([[-1e9, 1e9, 0.3, float("inf")]])
    check(backend, x, make_weight(3, 4), None, (torch.tensor(0.01), torch.tensor(100.0)))
    check(backend, x, make_weight(3, 4), None, (torch.tensor(0.1), 9), x_bits=4)


@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 0, 20), (2, 3, 20), (2, 3, 4, 20)])
def test_any_number_of_dimensions(backend, shape):
    x, weight = torch.randn(shape), prepare_int8(*make_weight(6, 20), backend=backend)
    token = torch.full((*shape[:-1], 1), 0.02), torch.full((*shape[:-1], 1), 120.0)
    tensor = torch.tensor(0.02), torch.tensor(120.0)
    assert int8_linear(x, weight, None, *token).shape == (*shape[:-1], 6)
    torch.testing.assert_close(int8_linear(x, weight, None, *token), int8_linear(x, weight, None, *tensor))


@each_grid
def test_rows_in_blocks_are_the_rows_in_one(backend, grid):
    x, weight = torch.randn(300, 4096), prepare_int8(*make_weight(16, 4096), backend=backend)  # blocks of 64 rows
    scale, zero_point = make_grid(x, grid)
    rows = [slice(0, 299), slice(299, 300)]
    parts = [(scale[r], zero_point[r]) if scale.ndim else (scale, zero_point) for r in rows]
    pieces = [int8_linear(x[r], weight, None, *part) for r, part in zip(rows, parts, strict=True)]
    assert torch.equal(int8_linear(x, weight, None, scale, zero_point), torch.cat(pieces))


@each_grid
@each_symmetric
def test_a_block_of_one_row_of_a_transposed_input(backend, symmetric, grid, monkeypatch):
    """Its strides say nothing, and `_int_mm` believes them."""
    monkeypatch.setattr("lightning_qnoise.ops.int8._BLOCK", 1)  # blocks of 16 rows
    for x in (torch.randn(24, 17).t(), torch.randn(24, 5).t()[:1], torch.randn(24, 1).t()):
        check(backend, x, make_weight(7, 24, symmetric), None, make_grid(x, grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_blocks_in_another_dtype(backend, dtype):
    x = torch.randn(300, 4096).to(dtype)
    y = int8_linear(x, prepare_int8(*make_weight(16, 4096), backend=backend), None, *make_grid(x.float(), "token"))
    assert y.dtype == dtype and y.shape == (300, 16)


@each_grid
def test_a_transposed_input(backend, grid):
    for x in (torch.randn(24, 10).t(), torch.randn(24, 1).t(), torch.randn(24, 1, 3, 4).transpose(0, 3)):
        check(backend, x, make_weight(7, 24), None, make_grid(x, grid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_output_has_the_dtype_of_the_input(backend, dtype):
    x, bias = torch.randn(5, 32).to(dtype), torch.randn(8).to(dtype)
    tolerance = 2e-7 + torch.finfo(dtype).eps / 50
    check(backend, x, make_weight(8, 32), bias, make_grid(x.float(), "token"), tolerance=tolerance)


def test_parameters_and_inputs_that_need_a_gradient(backend):
    bias = torch.nn.Parameter(torch.randn(8))
    x = torch.randn(5, 32, requires_grad=True)
    weight = prepare_int8(*make_weight(8, 32), backend=backend)
    y = int8_linear(x, weight, bias, torch.tensor(0.02), torch.tensor(128.0))
    assert not y.requires_grad


@needs_onednn
def test_a_weight_is_one_byte_an_element():
    codes, scale, zero_point = make_weight(48, 64)
    weight = prepare_int8(codes, scale, zero_point, backend="int_mm")
    assert weight.matrix.dtype == torch.int8 and torch.equal(weight.matrix.t() + 128, codes.to(torch.int8))
    packed = prepare_int8(codes, scale, zero_point, backend="onednn").matrix.weight
    assert packed.dtype == torch.int8 and packed.numel() == 48 * 64


@needs_onednn
def test_large_weights_go_to_onednn():
    small, large = (prepare_int8(*make_weight(n, 1024)).matrix for n in (511, 512))
    assert isinstance(small, torch.Tensor) and not isinstance(large, torch.Tensor)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@each_symmetric
def test_a_grid_of_tensors_is_that_of_numbers(backend, symmetric, per):
    """On a GPU the zero point of a whole input stays a tensor."""
    x, weight = torch.randn(5, 24), prepare_int8(*make_weight(7, 24, symmetric, per), backend=backend)
    scale = torch.tensor(0.03)
    for zero_point in (0, 128, 131):
        grids = zero_point, torch.tensor(float(zero_point))
        known, read = (int8_linear(x, weight, None, scale, zero) for zero in grids)
        torch.testing.assert_close(known, read, rtol=1e-6, atol=1e-6)
        rows = int8_linear(x, weight, None, scale.expand(5, 1), zero_point)
        torch.testing.assert_close(rows, known)


def test_no_float_weight_is_made(backend):
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    weight, x = make_weight(96, 128), torch.randn(4, 128)
    with Watch():
        int8_linear(x, prepare_int8(*weight, backend=backend), None, *make_grid(x, "token"))
    assert seen and all(t.numel() < 96 * 128 for t in seen if t.is_floating_point())


def test_errors():
    weight = prepare_int8(*make_weight(4, 8))
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"input \[\.\.\., 8\]"):
        int8_linear(torch.randn(2, 9), weight, None, one, one)
    with pytest.raises(ValueError, match="3 scales"):
        int8_linear(torch.randn(2, 8), weight, None, torch.ones(3, 1), torch.ones(3, 1))
    with pytest.raises(ValueError, match="one scale per row, got 16 scales for 4 rows"):
        prepare_int8(torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 4), None)
    with pytest.raises(ValueError, match="overflow"):
        prepare_int8(torch.zeros(1, 131_072, dtype=torch.uint8), torch.ones(1), None)


@each_grid
def test_a_row_of_zeros_leaves_the_bias_exact(backend, grid):
    """Its scale of one and its zero point of zero would be large numbers that cancel."""
    codes, scale, zero_point = make_weight(6, 64)
    codes[2:4], scale[2:4], zero_point[2:4] = 0, 1, 0
    x, bias = 100 * torch.randn(5, 64), torch.randn(6)
    y = int8_linear(x, prepare_int8(codes, scale, zero_point, 8, backend), bias, *make_grid(x, grid))
    assert torch.equal(y[:, 2:4], bias[2:4].expand(5, 2))
