"""The operators as a GPU runs them, on CPU tensors in the interpreter, against float64 and against the references."""

import pytest
import torch
import torch.nn.functional as F
from kernels.random_weights import poison, random_weight

from lightning_qnoise.ops import pq_cuda, pq_cuda_grad, pq_grad, pq_library

EPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
ROUTES = ["lookup", "gemv", "gemm", "decode"]
each_dtype = pytest.mark.parametrize("dtype", EPS, ids=str)
each_code = pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int64], ids=str)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of a few rows or groups, the last one shorter."""
    monkeypatch.setattr(pq_cuda, "SLICE_BYTES", 1500)


def assert_near(actual, expected, dtype=torch.float32):
    """As near as `dtype` rounds, measured by the largest element."""
    assert actual.shape == expected.shape
    size = max(expected.abs().max().item(), 1e-6) if expected.numel() else 1
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=EPS[dtype] * size)


def summed_by_code(grad, codes, k, average=False):
    """Gradient of the codebook of the gradient of a matrix, block by block in float64."""
    blocks, flat = grad.double().reshape(codes.numel(), -1), codes.flatten().tolist()
    rows = [[block for block, code in zip(blocks, flat, strict=True) if code == i] for i in range(k)]
    sums = [torch.stack(row).sum(0) if row else torch.zeros(blocks.shape[1]).double() for row in rows]
    return torch.stack([s / max(1, len(row) if average else 1) for s, row in zip(sums, rows, strict=True)])


def watch(monkeypatch, module, name):
    """Count the calls of a function."""
    function, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))
    return calls


@pytest.mark.parametrize("route", ROUTES)
@each_dtype
def test_every_route(route, dtype, small_slices):
    weight = random_weight(n_out=21, groups=16, dtype=dtype, code_dtype=torch.int64)
    x, bias = torch.randn(1, 2, 128).to(dtype), torch.randn(21)
    for b in (None, bias, bias.double(), bias.to(dtype), bias.repeat_interleave(2)[::2]):
        y = pq_cuda.linear(x, *weight.args, b, route)
        assert y.dtype == dtype and y.is_contiguous()
        assert_near(y, F.linear(x.double(), weight.dense.double(), None if b is None else b.double()), dtype)
        assert_near(y, pq_library._linear(x, *weight.args, b), dtype)
    assert torch.equal(pq_cuda.linear(x, weight.codes, weight.codebook.float(), b, route), y)


@pytest.mark.parametrize(("rows", "route"), [(1, "lookup"), (2, "gemv"), (16, "gemm"), (257, "decode")])
def test_the_route_is_the_one_that_is_chosen(rows, route, monkeypatch):
    from lightning_qnoise.kernels import gemm, gemv, table_gemv

    kernels = {"lookup": (table_gemv, "pq_table_gemv"), "gemv": (gemv, "pq_gemv"), "gemm": (gemm, "pq_gemm")}
    kernels["decode"] = (pq_cuda, "_product_of_slices")
    calls = {name: watch(monkeypatch, *kernel) for name, kernel in kernels.items()}
    weight = random_weight(n_out=128, groups=4, k=4, dtype=torch.float16)
    x = torch.randn(rows, 32).half()
    assert_near(pq_library._linear_cuda(x, *weight.args), x.double() @ weight.dense.double().t(), torch.float16)
    assert [name for name, called in calls.items() if called] == [route]


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40)])
def test_shapes_of_the_input(shape):
    weight = random_weight(n_out=24)
    x = torch.randn(shape)
    assert_near(pq_cuda.linear(x, *weight.args), x.double() @ weight.dense.double().t())


@each_dtype
@each_code
def test_decode_and_embedding(dtype, code_dtype):
    weight = random_weight(k=300, code_dtype=torch.int16 if code_dtype == torch.uint8 else code_dtype)
    assert torch.equal(pq_library._decode_cuda(*weight.args, dtype), weight.dense.to(dtype))
    ids = torch.randint(20, (2, 3))
    assert torch.equal(pq_library._embedding_cuda(ids, *weight.args, dtype, 3), weight.dense[ids].to(dtype))
    assert pq_library._decode_cuda(*weight.args).dtype == torch.float32


@each_dtype
@each_code
@pytest.mark.parametrize("d", [3, 8])
def test_gradient_of_the_input(dtype, code_dtype, d, small_slices):
    weight = random_weight(n_out=21, groups=33, d=d, dtype=dtype, code_dtype=code_dtype)
    grad = torch.randn(2, 3, 21).to(dtype)
    ours = pq_library._input_grad_cuda(grad, *weight.args)
    assert ours.dtype == dtype
    assert_near(ours, grad.double() @ weight.dense.double(), dtype)
    assert_near(ours, pq_grad.input_grad(grad, *weight.args), dtype)


@each_dtype
@each_code
@pytest.mark.parametrize("average", [False, True])
def test_gradient_of_the_codebook(dtype, code_dtype, average, small_slices):
    weight = random_weight(n_out=21, groups=6, d=3, k=7, code_dtype=code_dtype)
    weight.codes[weight.codes == 4] = 5  # 4 is unused
    x, grad = torch.randn(2, 3, 18).to(dtype), torch.randn(2, 3, 21).to(dtype)
    ours = pq_library._codebook_grad_cuda(grad, x, *weight.args, average)
    dense = grad.reshape(6, 21).double().t() @ x.reshape(6, 18).double()
    assert ours.dtype == torch.float32 and not ours[4].any()
    assert_near(ours, summed_by_code(dense, weight.codes, 7, average), dtype)
    assert_near(ours, pq_grad.codebook_grad(grad, x, *weight.args, average), dtype)
    assert torch.equal(ours, pq_library._codebook_grad_cuda(grad, x, *weight.args, average))


@each_dtype
@pytest.mark.parametrize("codes", ["none", "picked", "others"])
def test_gradient_of_picked_blocks(dtype, codes):
    picked, codebook = torch.randint(5, (4, 3, 6)).byte(), torch.randn(9, 4).half()
    divisor = {"none": None, "picked": picked, "others": torch.randint(9, (20, 6))}[codes]
    grad = torch.randn(4, 6, 3, 4).to(dtype).transpose(1, 2).reshape(4, 3, 24)
    ours = pq_library._segment_sum_cuda(grad, picked, codebook, divisor)
    expected = summed_by_code(grad, picked, 9)
    if divisor is not None:
        expected = expected / torch.bincount(divisor.flatten().long(), minlength=9).clamp(min=1)[:, None]
    assert ours.dtype == torch.float16
    assert_near(ours, expected, torch.float16)
    assert_near(ours, pq_grad.segment_sum(grad, picked, codebook, divisor), torch.float16)


def test_the_references_serve_what_the_kernels_do_not(monkeypatch):
    """Another dtype, two dtypes, or nothing: no kernel is asked."""
    names = ["decode", "linear", "embedding"]
    calls = [watch(monkeypatch, pq_cuda, name) for name in names]
    calls += [watch(monkeypatch, pq_cuda_grad, name) for name in ("input_grad", "codebook_grad", "segment_sum")]
    weight = random_weight()
    codes, codebook = weight.args
    dense, ids = weight.dense.double(), torch.tensor([3, 0])
    x, grad = torch.randn(2, 40).double(), torch.randn(2, 20).double()
    bias = torch.randn(20)
    assert torch.equal(pq_library._decode_cuda(codes, codebook, torch.float64), dense)
    assert torch.equal(pq_library._embedding_cuda(ids, codes, codebook.double()), dense[ids])
    assert_near(pq_library._linear_cuda(x, codes, codebook, bias), F.linear(x, dense, bias.double()))
    assert_near(pq_library._input_grad_cuda(grad, codes, codebook), grad @ dense)
    expected = summed_by_code(grad.t() @ x, codes, 12)
    assert_near(pq_library._codebook_grad_cuda(grad, x, codes, codebook, False), expected)
    assert_near(pq_library._codebook_grad_cuda(grad.half(), x.float(), codes, codebook, False), expected, torch.half)
    sums = pq_library._segment_sum_cuda(x, codes[:2], codebook, None)
    assert_near(sums, summed_by_code(x, codes[:2], 12))

    x, none = x.float(), codes[:, :0]
    assert torch.equal(pq_library._linear_cuda(x[:, :0], none, codebook, bias), bias.expand(2, 20))
    assert pq_library._linear_cuda(x[:0], codes, codebook).shape == (0, 20)
    assert pq_library._linear_cuda(x, codes[:0], codebook).shape == (2, 0)
    assert pq_library._embedding_cuda(ids[:0], codes, codebook).shape == (0, 40)
    assert pq_library._input_grad_cuda(grad[:0].float(), codes, codebook).shape == (0, 40)
    zero = pq_library._codebook_grad_cuda(grad[:0].float(), x[:0], codes, codebook, True)
    assert torch.equal(zero, torch.zeros(12, 8))
    assert not any(calls)


def test_what_does_not_fit_is_refused():
    codes, codebook = random_weight().args
    for call in (pq_library._decode_cuda, lambda *a: pq_library._embedding_cuda(torch.tensor([0]), *a)):
        with pytest.raises(ValueError, match="expected integer codes"):
            call(codes.float(), codebook)
    with pytest.raises(ValueError, match=r"expected an input \[..., 40\], got \[2, 39\]"):
        pq_library._linear_cuda(torch.randn(2, 39), codes, codebook)
