import pytest
import torch
import torch.nn.functional as F
from kernels.random_weights import poison, random_weight

from lightning_qnoise.kernels.gemm import pq_gemm
from lightning_qnoise.kernels.gemv import pq_gemv
from lightning_qnoise.kernels.table_gemv import pq_table_gemv

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
each_kernel = pytest.mark.parametrize("kernel", [pq_table_gemv, pq_gemv, pq_gemm])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def check(kernel, x, weight, dtype=torch.float32, **kwargs):
    y = kernel(x, weight.words, weight.codebook, weight.block_size, weight.bits, **kwargs)
    scale, bias = (None if v is None else v.double() for v in (kwargs.get("scale"), kwargs.get("bias")))
    expected = F.linear(x.double(), weight.dense.double())
    expected = expected if scale is None else expected * scale
    expected = expected if bias is None else expected + bias
    assert y.dtype == x.dtype
    size = expected.abs().max().item() if expected.numel() else 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[dtype] * size)


@each_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 9, 16])
def test_block_sizes(kernel, d, dtype):
    weight = random_weight(n_out=7, n_in=6 * d, d=d, dtype=dtype)
    check(kernel, torch.randn(2, 6 * d).to(dtype), weight, dtype)


@each_kernel
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, {"n_out": 1, "n_in": 8}),
        (3, {"n_out": 140, "n_in": 130}),  # several programs, the last block is cut
        (5, {"n_out": 3, "n_in": 7, "d": 4}),
        (1, {"k": 1}),
        (1, {"k": 2, "bits": 1}),
        (2, {"k": 4, "bits": 2}),
        (4, {"k": 13, "bits": 4}),
        (1, {"k": 300, "bits": 16, "n_in": 24}),
        (2, {"k": 256, "n_in": 100, "n_out": 33}),
        (2, {"n_in": 48, "n_codebooks": 3}),
        (3, {"n_in": 40, "n_codebooks": 5}),
        (2, {"word": torch.uint8}),
        (1, {"n_out": 0}),
        (17, {"n_out": 65, "n_in": 72}),
        (0, {}),
    ],
    ids=str,
)
def test_shapes(kernel, rows, sizes):
    weight = random_weight(**sizes)
    check(kernel, torch.randn(rows, weight.n_in), weight)


@each_kernel
@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_splits(kernel, splits):
    weight = random_weight(n_in=200, n_out=130)
    check(kernel, torch.randn(2, 200), weight, splits=splits)


@each_kernel
def test_strides(kernel):
    weight = random_weight()
    check(kernel, torch.randn(40, 3).t(), weight)
    check(kernel, torch.randn(3, 80)[:, ::2], weight)
    check(kernel, torch.randn(40).expand(3, 40), weight)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scale_and_bias(kernel, dtype):
    weight, x = random_weight(dtype=dtype), torch.randn(2, 40).to(dtype)
    check(kernel, x, weight, dtype, bias=torch.randn(20))
    check(kernel, x, weight, dtype, scale=torch.rand(20), bias=torch.randn(20).to(dtype))


def test_many_rows():
    check(pq_gemm, torch.randn(131, 40), random_weight())  # two tiles


def test_table_in_half_precision():
    check(pq_table_gemv, torch.randn(2, 40), random_weight(), torch.float16, table_dtype=torch.float16)
    with pytest.raises(TypeError, match="in float32 or float16"):
        pq_table_gemv(torch.randn(2, 40), *random_weight().args[:2], 8, table_dtype=torch.bfloat16)


@each_kernel
def test_inputs_are_checked(kernel):
    words, codebook, *_ = random_weight().args
    with pytest.raises(ValueError, match="6 groups of codes of 8 bits are contiguous"):
        kernel(torch.randn(2, 48), words[:1], codebook, 8)
    with pytest.raises(ValueError, match=r"the input is \[M, 40\]"):
        kernel(torch.randn(1, 2, 40), words, codebook, 8)
    with pytest.raises(ValueError, match=r"the bias is contiguous \[20\], got \[19\]"):
        kernel(torch.randn(2, 40), words, codebook, 8, bias=torch.randn(19))
    with pytest.raises(TypeError, match="float64"):
        kernel(torch.randn(2, 40).double(), words, codebook, 8)
