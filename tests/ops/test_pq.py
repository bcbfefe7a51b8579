import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import pq_reference

from lightning_qnoise.ops import pq_cpu, pq_library
from lightning_qnoise.ops.pq import pq_decode, pq_embedding, pq_linear

OPS = torch.ops.lightning_qnoise
each_route = pytest.mark.parametrize("route", ["gather", "lookup", "decode"])


def make(n_out, groups, n_codewords, block_size, code_dtype=torch.uint8, dtype=torch.float32):
    codes = torch.randint(n_codewords, (n_out, groups)).to(code_dtype)
    return codes, torch.randn(n_codewords, block_size).to(dtype)


def dense(codes, codebook):
    """The matrix in float64, one block at a time."""
    shape = (codes.shape[0], codes.shape[1] * codebook.shape[1])
    return torch.from_numpy(pq_reference(codes.numpy(), codebook.detach().double().numpy(), shape))


def plain_linear(x, codes, codebook, bias=None):
    """Plain autograd through indexing."""
    return F.linear(x, codebook[codes.long()].flatten(1), bias)


def blockwise_grad(grad, codes, n_codewords, average=False):
    """Codebook gradient of the gradient of the matrix `[out, in]`, with NumPy."""
    blocks = grad.double().numpy().reshape(codes.numel(), -1)
    flat = codes.numpy().ravel()
    rows = [blocks[flat == k] for k in range(n_codewords)]
    return torch.from_numpy(np.stack([r.sum(0) / (max(1, len(r)) if average else 1) for r in rows]))


def assert_near(actual, expected, tolerance=1e-6):
    actual, expected = actual.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


# Forward


@each_route
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8, 9, 16])
def test_every_route_is_the_product_with_the_matrix(route, dtype, block_size):
    for n_out, groups, n_codewords, rows in [(1, 1, 1, 1), (37, 5, 7, 2), (64, 70, 256, 17), (300, 3, 2, 65)]:
        codes, codebook = make(n_out, groups, n_codewords, block_size, dtype=dtype)
        x = torch.randn(rows, groups * block_size)
        actual = pq_cpu.linear(x, codes, codebook, route)
        assert actual.is_contiguous() and actual.dtype == x.dtype
        assert_near(actual, x.double() @ dense(codes, codebook).t())


@each_route
def test_routes_work_in_several_parts(route, monkeypatch):
    monkeypatch.setattr(pq_cpu, "_BUFFER", 200)
    codes, codebook = make(53, 11, 5, 4, torch.int16)
    x = torch.randn(130, 44, dtype=torch.float64)
    assert_near(pq_cpu.linear(x, codes, codebook, route), x @ dense(codes, codebook).t(), 1e-7)


@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decode_is_exact(code_dtype, dtype):
    for block_size in (1, 3, 4, 8, 9):
        codes, codebook = make(13, 6, 101, block_size, code_dtype, dtype)
        assert torch.equal(pq_decode(codes, codebook).double(), dense(codes, codebook))
        assert pq_decode(codes, codebook, torch.float32).dtype == torch.float32
        ids = torch.randint(13, (2, 5))
        assert torch.equal(pq_embedding(ids, codes, codebook).double(), dense(codes, codebook)[ids])
        assert pq_embedding(ids, codes, codebook, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codebook_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mixed_dtypes_accumulate_in_float32(x_dtype, codebook_dtype):
    codes, codebook = make(90, 128, 16, 8, dtype=codebook_dtype)
    x, bias = torch.randn(3, 1024).to(x_dtype), torch.randn(90).to(codebook_dtype)
    actual = pq_linear(x, codes, codebook, bias)
    assert actual.dtype == x_dtype
    assert_near(actual, x.double() @ dense(codes, codebook).t() + bias, torch.finfo(x_dtype).eps / 2 + 1e-6)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
def test_shapes_of_the_input(shape):
    codes, codebook = make(10, 6, 9, 4)
    x, bias = torch.randn(shape), torch.randn(10)
    assert_near(pq_linear(x, codes, codebook, bias), x.double() @ dense(codes, codebook).t() + bias)


def test_strided_inputs():
    codes, codebook = make(10, 6, 9, 4)
    strided = codes.t().contiguous().t(), torch.randn(4, 9).t()
    xs = [torch.randn(24, 5).t(), torch.randn(5, 48)[:, ::2], torch.randn(24).expand(5, 24)]
    xs.append(torch.randn(5, 1).expand(5, 24))
    for x in xs:
        assert_near(pq_linear(x, codes, codebook), x.double() @ dense(codes, codebook).t())
        assert_near(pq_linear(x, *strided), x.double() @ dense(*strided).t())
    offset = torch.randn(9 * 4 + 1)[1:].view(9, 4)
    assert torch.equal(pq_decode(codes, offset).double(), dense(codes, offset))


def test_what_does_not_fit_is_refused():
    codes, codebook = make(10, 6, 9, 4)
    x = torch.randn(2, 24)
    with pytest.raises(ValueError, match=r"expected an input \[..., 24\], got \[2, 23\]"):
        pq_linear(x[:, 1:], codes, codebook)
    with pytest.raises(ValueError, match=r"expected a bias \[10\], got \[9\]"):
        pq_linear(x, codes, codebook, torch.zeros(9))
    for call in (pq_decode, lambda *a: pq_linear(x, *a), lambda *a: pq_embedding(torch.tensor([0]), *a)):
        with pytest.raises(ValueError, match="expected integer codes"):
            call(codes.flatten(), codebook)
        with pytest.raises(ValueError, match="expected integer codes"):
            call(codes.float(), codebook)
    with pytest.raises((IndexError, RuntimeError)):
        pq_linear(x, torch.full_like(codes, 9), codebook)


# Gradients


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)])
def test_gradients_by_finite_differences(shape):
    codes, codebook = make(10, 6, 9, 4, dtype=torch.float64)
    x, bias = torch.randn(shape, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, codebook, bias)]
    assert torch.autograd.gradcheck(lambda x, c, b: pq_linear(x, codes, c, b), inputs)
    assert torch.autograd.gradcheck(lambda c: pq_decode(codes, c), [codebook])
    ids = torch.tensor([[0, 3], [3, 9]])
    assert torch.autograd.gradcheck(lambda c: pq_embedding(ids, codes, c), [codebook])


@pytest.mark.parametrize("block_size", [3, 8])
@pytest.mark.parametrize("needed", ["x", "c", "b", "xc", "xb", "cb", "xcb"])
def test_gradients_are_those_of_the_plain_expression(needed, block_size):
    codes, codebook = make(70, 9, 33, block_size)
    values = {"x": torch.randn(5, 4, 9 * block_size), "c": codebook, "b": torch.randn(70)}
    ours = {k: v.clone().requires_grad_(k in needed) for k, v in values.items()}
    theirs = {k: v.double().requires_grad_(k in needed) for k, v in values.items()}
    grad = torch.randn(5, 4, 70)
    pq_linear(ours["x"], codes, ours["c"], ours["b"]).backward(grad)
    plain_linear(theirs["x"], codes, theirs["c"], theirs["b"]).backward(grad.double())
    for name, tensor in ours.items():
        assert (tensor.grad is not None) == (name in needed)
        if name in needed:
            assert_near(tensor.grad, theirs[name].grad, 3e-6)


@pytest.mark.parametrize("average", [False, True])
def test_codebook_gradient_sums_or_averages_the_blocks(average):
    codes, codebook = make(40, 6, 11, 4)
    codes[codes == 7] = 2  # 7 is unused
    grad = torch.randn(40, 24)
    codebook.requires_grad_()
    pq_decode(codes, codebook, None, average).backward(grad)
    assert_near(codebook.grad, blockwise_grad(grad, codes, 11, average))
    assert not codebook.grad[7].any()

    codebook.grad, (x, grad) = None, (torch.randn(6, 24), torch.randn(6, 40))
    pq_linear(x, codes, codebook, None, average).backward(grad)
    assert_near(codebook.grad, blockwise_grad(grad.t().double() @ x.double(), codes, 11, average), 3e-6)

    codebook.grad, ids, grad = None, torch.tensor([3, 3, 0, 1]), torch.randn(4, 24)
    pq_embedding(ids, codes, codebook, None, 1, average).backward(grad)
    full = torch.zeros(40, 24, dtype=torch.float64).index_add_(0, ids[:3], grad[:3].double())
    assert_near(codebook.grad, blockwise_grad(full, codes, 11, average))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_accumulated_in_float32(dtype):
    codes, codebook = make(512, 64, 2, 8, dtype=dtype)  # 16,384 blocks a codeword
    codebook.requires_grad_()
    x, grad = torch.rand(4, 512).to(dtype), torch.rand(4, 512).to(dtype) / 1024
    pq_linear(x, codes, codebook).backward(grad)
    expected = blockwise_grad(grad.t().double() @ x.double(), codes, 2)
    assert codebook.grad.dtype == dtype
    assert ((codebook.grad.double() - expected).abs() / expected).max() <= torch.finfo(dtype).eps / 2 + 1e-5


def test_gradients_are_deterministic():
    codes, codebook = make(300, 40, 5, 8)
    codebook.requires_grad_()
    x, grad = torch.randn(20, 320), torch.randn(20, 300)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(pq_linear(x, codes, codebook), codebook, grad)[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def test_gradients_of_an_empty_batch_are_zero():
    codes, codebook = make(10, 6, 9, 4)
    codebook.requires_grad_()
    x = torch.randn(0, 24, requires_grad=True)
    pq_linear(x, codes, codebook).sum().backward()
    assert x.grad.shape == (0, 24) and torch.equal(codebook.grad, torch.zeros(9, 4))
    ids = torch.zeros(0, dtype=torch.long)
    pq_embedding(ids, codes, codebook).sum().backward()
    assert torch.equal(codebook.grad, torch.zeros(9, 4))


def test_a_second_derivative_is_refused():
    codes, codebook = make(10, 6, 9, 4)
    codebook.requires_grad_()
    x = torch.randn(3, 24, requires_grad=True)
    for y, of in [(pq_linear(x, codes, codebook), x), (pq_linear(x, codes, codebook), codebook)]:
        (first,) = torch.autograd.grad((y**2).sum(), of, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()


# The operators within torch


def samples():
    codes, codebook = make(10, 6, 9, 4)
    codebook.requires_grad_()
    x, bias = torch.randn(2, 3, 24, requires_grad=True), torch.randn(10, requires_grad=True)
    ids = torch.tensor([[0, 3], [3, 9]])
    grad = torch.randn(2, 3, 10, requires_grad=True)
    return {
        "pq_decode": [(codes, codebook), (codes.short(), codebook, torch.float16, True)],
        "pq_linear": [
            (x, codes, codebook, bias),
            (x[0, 0].detach(), codes, codebook),
            (torch.randn(0, 24, requires_grad=True), codes, codebook, None, True),
        ],
        "pq_embedding": [(ids, codes, codebook), (ids.int(), codes, codebook, torch.float16, 3, True)],
        "pq_input_grad": [(grad, codes, codebook)],
        "pq_codebook_grad": [(grad, x, codes, codebook, True)],
        "pq_segment_sum": [(x, codes[:6].view(2, 3, 6), codebook, None), (x[0], codes[:3], codebook, codes)],
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    for arguments in samples()[name]:
        if "grad" in name or "segment" in name:
            arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", samples())
def test_meta_tensors_have_the_real_shapes(name):
    operator = getattr(OPS, name).default
    for arguments in samples()[name]:
        with torch.no_grad():
            real = operator(*arguments)
            meta = operator(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@torch.no_grad()
def test_the_reference_of_other_devices():
    for x, codes, codebook, *rest in samples()["pq_linear"]:
        assert_near(pq_library._linear(x, codes, codebook, *rest), pq_linear(x, codes, codebook, *rest))
    for arguments in samples()["pq_decode"]:
        assert torch.equal(pq_library._decode(*arguments), pq_decode(*arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic):
    codes, codebook = make(10, 6, 9, 4)

    def run(x, ids, codebook, bias):
        rows = pq_embedding(ids, codes, codebook) + pq_decode(codes, codebook)[0]
        return pq_linear(x, codes, codebook, bias).relu().sum() + rows.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (1, 5):
        values = torch.randn(rows, 24), codebook, torch.randn(10)
        grads = []
        for function in (run, compiled):
            x, c, b = (v.clone().requires_grad_() for v in values)
            function(x, torch.tensor([1, 4]), c, b).backward()
            grads.append((x.grad, c.grad, b.grad))
        for expected, actual in zip(*grads, strict=True):
            assert_near(actual, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_linear_does(compiled):
    codes, codebook = make(10, 6, 9, 4)
    x, bias = torch.randn(3, 24, requires_grad=True), torch.randn(10, requires_grad=True)
    codebook.requires_grad_()

    def run(x, codebook, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return pq_linear(x, codes, codebook, bias)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = run(x, codebook, bias)
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a backward pass within it computes in float32 all the same
        y.float().sum().backward()
    h = [t.detach().bfloat16().double().requires_grad_() for t in (x, codebook, bias)]
    plain = plain_linear(h[0], codes, h[1], h[2])
    plain.sum().backward()
    assert_near(y, plain, 0.01)
    for tensor, half in zip((x, codebook, bias), h, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert_near(tensor.grad, half.grad, 0.01)


def test_inference_mode():
    codes, codebook = make(10, 6, 9, 4)
    with torch.inference_mode():
        x = torch.randn(3, 24)
        assert_near(pq_linear(x, codes, codebook), x.double() @ dense(codes, codebook).t())
        assert pq_decode(codes, codebook).is_inference()
