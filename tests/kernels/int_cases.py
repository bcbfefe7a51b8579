import pytest
import torch
import torch.nn.functional as F
from kernels.random_weights import poison

from lightning_qnoise.kernels.int_gemm import int_gemm
from lightning_qnoise.ops import int_linear_cuda, int_linear_slices
from lightning_qnoise.ops.int_matrix import IntMatrix

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
each_bits = pytest.mark.parametrize("bits", [4, 8])
each_symmetric = pytest.mark.parametrize("symmetric", [False, True])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def make(n_out, n_in, bits, per="row", symmetric=False):
    """Packed codes `[out, bytes]`, scale, zero point, and the weight in float64."""
    size = {"tensor": n_out * n_in, "row": n_in}.get(per, per)
    codes = torch.randint(2**bits, (n_out, n_in))
    scale = torch.rand(1 if per == "tensor" else n_out, 1 if isinstance(per, str) else n_in // size) / 100 + 0.001
    zero_point = None if symmetric else torch.randint(2**bits, scale.shape)
    zeros = torch.full(scale.shape, 2 ** (bits - 1)) if symmetric else zero_point
    wide = [t.repeat_interleave(n_in // t.shape[1], 1).expand(n_out, n_in).double() for t in (scale, zeros)]
    packed = codes if bits == 8 else codes[:, 0::2] + 16 * codes[:, 1::2]
    return packed.byte(), scale, None if symmetric else zero_point.byte(), (codes - wide[1]) * wide[0]


def assert_near(y, x, dense, bias=None):
    expected = F.linear(x.double(), dense, None if bias is None else bias.double())
    assert y.dtype == x.dtype
    size = expected.abs().max().item() if expected.numel() else 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[x.dtype] * size)


def check(x, *sizes, bias=None, splits=None, **options):
    codes, scale, zero_point, dense = make(*sizes, **options)
    assert_near(int_gemm(x, codes, scale, zero_point, sizes[2], bias, splits), x, dense, bias)


@each_bits
@each_symmetric
@pytest.mark.parametrize("per", ["tensor", "row", 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scales(bits, symmetric, per, dtype):
    check(torch.randn(3, 96).to(dtype), 7, 96, bits, per=per, symmetric=symmetric)


@each_bits
@pytest.mark.parametrize("group", [32, 64, 96, 160])
def test_groups(bits, group):
    check(torch.randn(2, 2 * group), 5, 2 * group, bits, per=group)


@each_bits
@pytest.mark.parametrize(
    ("rows", "n_out", "n_in"), [(1, 1, 2), (17, 65, 130), (1, 131, 34), (0, 5, 8), (2, 0, 8), (2, 3, 0), (67, 3, 16)]
)
def test_shapes(bits, rows, n_out, n_in):
    check(torch.randn(rows, n_in), n_out, n_in, bits)


def test_bytes_of_an_odd_row():
    check(torch.randn(2, 33), 4, 33, 8)
    check(torch.randn(2, 6).bfloat16(), 4, 6, 4)


@each_bits
@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_splits(bits, splits):
    check(torch.randn(2, 260), 66, 260, bits, splits=splits)
    check(torch.randn(2, 192), 3, 192, bits, splits=splits, per=64)


@each_bits
def test_strides(bits):
    check(torch.randn(40, 3).t(), 6, 40, bits)
    check(torch.randn(3, 80)[:, ::2], 6, 40, bits)
    check(torch.randn(40).expand(3, 40), 6, 40, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bias(dtype):
    check(torch.randn(2, 40).to(dtype), 20, 40, 8, bias=torch.randn(20))
    check(torch.randn(2, 40).to(dtype), 20, 40, 4, bias=torch.randn(20).to(dtype))


@each_bits
def test_whole_numbers_come_out_exactly(bits):
    x, (codes, _, _, _) = torch.randint(-8, 8, (4, 70)).float(), make(9, 70, bits)
    zeros, top = torch.tensor([0, 2**bits - 1] * 5)[:9, None].byte(), 2**bits - 1
    values = codes if bits == 8 else torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    y = int_gemm(x, codes, torch.ones(9, 1), zeros, bits)
    assert torch.equal(y, x @ (values.float() - zeros).t())
    assert values.max() == top


def test_arguments_are_checked():
    codes, scale, zero_point, _ = make(6, 64, 8, per=32)
    x = torch.randn(2, 64)
    for arguments, error, message in [
        ((x[0], codes, scale), ValueError, "x is"),
        ((x, codes[:, 1:], scale), ValueError, r"x is \[M, in\] and codes contiguous \[out, in \* 8 / 8\]"),
        ((x, codes, scale, zero_point, 4), ValueError, "x is"),
        ((x, codes, scale[1:]), ValueError, r"the scale is contiguous \[1, 1\] or \[6, groups\], got \[5, 2\]"),
        ((x, codes, torch.ones(6, 8)), ValueError, "multiples of 16 bytes: 64 in a row, 8 groups"),
        ((x, codes, scale, zero_point[:, :1]), ValueError, "the zero points are"),
        ((x, codes, scale, None, 8, torch.ones(5)), ValueError, r"the bias is contiguous \[6\], got \[5\]"),
        ((x, codes, scale, None, 3), TypeError, "codes of 4 or 8 bits"),
        ((x, codes.int(), scale), TypeError, "int32"),
        ((x, codes, scale.half()), TypeError, "float16"),
        ((x.double(), codes, scale), TypeError, "float64"),
    ]:
        with pytest.raises(error, match=message):
            int_gemm(*arguments)


@each_bits
@pytest.mark.parametrize(("per", "dtype"), [("row", torch.float16), ("tensor", torch.float32), (32, torch.bfloat16)])
def test_dispatch(bits, per, dtype, monkeypatch):
    """Up to the last row that the table names the kernel runs, and the slices do not."""
    (codes, scale, zero_point, dense), bias = make(5, 64, bits, per=per), torch.randn(5, dtype=torch.float64)
    matrix, x = IntMatrix(codes.flatten(), scale.t().contiguous().t(), zero_point, bits, 5, 64), torch.randn(3, 64)
    monkeypatch.setattr(int_linear_cuda, "KERNEL_ROWS", 2)
    refuse = lambda *args: pytest.fail("the other route")  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(int_linear_slices, "linear", refuse)
        few = x[:2].to(dtype)
        assert_near(int_linear_cuda.linear(few, matrix, bias), few, dense, bias)
    with monkeypatch.context() as patched:
        patched.setattr("lightning_qnoise.kernels.int_gemm.int_gemm", refuse)
        for many in (x.to(dtype), x[:1].double()):
            assert_near(int_linear_cuda.linear(many, matrix, bias), many, dense, bias)
