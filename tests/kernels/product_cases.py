import pytest
import torch
import torch.nn.functional as F
from kernels.random_weights import LAYOUTS, lay_out, poison, random_weight

from lightning_qnoise.kernels.common import code_tiles
from lightning_qnoise.kernels.gemm import pq_gemm
from lightning_qnoise.kernels.gemv import pq_gemv
from lightning_qnoise.kernels.table_gemv import pq_table_gemv

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
each_kernel = pytest.mark.parametrize("kernel", [pq_table_gemv, pq_gemv, pq_gemm])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def check(kernel, x, weight, **kwargs):
    y = kernel(x, *weight.args, **kwargs)
    bias = kwargs.get("bias")
    expected = F.linear(x.double(), weight.dense.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == expected.shape
    size = expected.abs().max().item() if expected.numel() else 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[x.dtype] * size)


@each_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 9, 16])
def test_block_sizes(kernel, d, dtype):
    weight = random_weight(n_out=7, groups=16, d=d, dtype=dtype)
    check(kernel, torch.randn(2, 16 * d).to(dtype), weight)


@each_kernel
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, {"n_out": 1, "groups": 1}),
        (3, {"n_out": 140, "groups": 20}),  # several programs
        (5, {"n_out": 3, "groups": 7, "d": 4}),
        (1, {"k": 1}),
        (2, {"k": 2, "groups": 32}),
        (4, {"k": 13}),
        (1, {"k": 300, "code_dtype": torch.int16, "groups": 8}),
        (2, {"k": 300, "code_dtype": torch.int32}),
        (2, {"k": 256, "groups": 48, "n_out": 33}),
        (1, {"n_out": 0}),
        (1, {"groups": 0}),
        (17, {"n_out": 65, "groups": 9}),
        (0, {}),
        (2, {"d": 32}),
    ],
    ids=str,
)
def test_shapes(kernel, rows, sizes):
    weight = random_weight(**sizes)
    check(kernel, torch.randn(rows, weight.n_in), weight)


@each_kernel
@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_splits(kernel, splits):
    weight = random_weight(groups=80, n_out=10)
    check(kernel, torch.randn(2, 640), weight, splits=splits)


@each_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [15, 16, 20])
def test_strides_of_codes(kernel, layout, groups):
    check(kernel, torch.randn(2, 4 * groups), random_weight(groups=groups, d=4, layout=layout))


@each_kernel
def test_strides_of_the_others(kernel):
    weight = random_weight()
    weight.codebook = weight.codebook.t().contiguous().t()
    for x in (torch.randn(40, 3).t(), torch.randn(3, 80)[:, ::2], torch.randn(40).expand(3, 40)):
        check(kernel, x, weight)


@each_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bias_and_mixed_dtypes(kernel, dtype):
    weight = random_weight(dtype=dtype)
    check(kernel, torch.randn(2, 40).to(dtype), weight, bias=torch.randn(20))
    check(kernel, torch.randn(2, 40).to(dtype), weight, bias=torch.randn(20).to(dtype))
    for empty in (random_weight(groups=0, dtype=dtype), random_weight(n_out=0, dtype=dtype)):
        check(kernel, torch.randn(2, empty.n_in).to(dtype), empty, bias=torch.randn(len(empty.codes)).to(dtype))
    weight.codebook = weight.codebook.float()  # cast to what x has
    check(kernel, torch.randn(2, 40).to(dtype), weight)


@each_kernel
def test_an_infinite_input_meets_no_padding(kernel):
    weight = random_weight(d=3)
    x = torch.randn(2, 15)
    x[0, 3] = torch.inf
    expected = F.linear(x, weight.dense)
    assert expected[0].isinf().all()
    torch.testing.assert_close(kernel(x, *weight.args), expected)


def test_many_rows():
    check(pq_gemm, torch.randn(131, 40), random_weight())  # two tiles


def test_many_outputs():
    check(pq_table_gemv, torch.randn(1, 16), random_weight(n_out=2049, groups=2))


def test_table_in_half_precision():
    x = torch.randn(2, 40)
    y = pq_table_gemv(x, *(weight := random_weight()).args, table_dtype=torch.float16)
    torch.testing.assert_close(y, F.linear(x, weight.dense), rtol=0, atol=2e-2)
    with pytest.raises(TypeError, match="in float32 or float16"):
        pq_table_gemv(x, *weight.args, table_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("groups", "layout", "dtype", "form"),  # codes of a word, words of a tile
    [
        (32, "rows", torch.uint8, (4, 4)),
        (32, "in whole words", torch.uint8, (4, 4)),
        (20, "rows", torch.uint8, (4, 1)),
        (15, "rows", torch.uint8, (1, 1)),
        (32, "in odd rows", torch.uint8, (1, 1)),
        (32, "at an odd address", torch.uint8, (1, 4)),
        (32, "in every other column", torch.uint8, (1, 4)),
        (32, "columns", torch.uint8, (1, 1)),
        (32, "rows", torch.int16, (1, 4)),
        (15, "rows", torch.int32, (1, 1)),
    ],
)
def test_codes_are_read_where_they_lie(groups, layout, dtype, form):
    codes = lay_out(torch.zeros(20, groups, dtype=dtype), layout)
    tiles = code_tiles(codes)
    assert tiles.words.data_ptr() == codes.data_ptr()
    assert (tiles.per_word, tiles.tile) == form
    assert tiles.steps * tiles.tile * tiles.per_word == groups
    assert code_tiles(codes, widest=1).tile == 1


@each_kernel
def test_inputs_are_checked(kernel):
    codes, codebook = random_weight().args
    x = torch.randn(2, 40)
    with pytest.raises(ValueError, match=r"the input is \[M, 40\], got \[2, 39\]"):
        kernel(x[:, 1:], codes, codebook)
    with pytest.raises(ValueError, match=r"the input is \[M, 40\], got \[1, 2, 40\]"):
        kernel(x[None], codes, codebook)
    with pytest.raises(ValueError, match=r"the bias is contiguous \[20\], got \[19\]"):
        kernel(x, codes, codebook, torch.randn(19))
    with pytest.raises(ValueError, match=r"1 part or more, got 0"):
        kernel(x, codes, codebook, splits=0)
    with pytest.raises(ValueError, match=r"32 columns at most, got 33"):
        kernel(torch.randn(2, 165), codes, torch.randn(12, 33))
    with pytest.raises(TypeError, match="float64"):
        kernel(x.double(), codes, codebook)
    with pytest.raises(TypeError, match="int64"):
        kernel(x, codes.long(), codebook)
    with pytest.raises(ValueError, match="on one device"):
        kernel(x, codes.to("meta"), codebook)
