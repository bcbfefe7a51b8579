import numpy as np
import pytest
import torch
from references import pack_reference
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qnoise import Int
from lightning_qnoise.ops import int_linear, int_linear_cuda, int_linear_slices, int_matrix
from lightning_qnoise.ops.int_matrix import IntMatrix

OPS = torch.ops.lightning_qnoise
each_bits = pytest.mark.parametrize("bits", range(2, 9))
each_symmetric = pytest.mark.parametrize("symmetric", [False, True])


def make(n_out, n_in, bits, per="row", symmetric=False):
    """The arguments behind `x`, packed as one long number, and the matrix in float64, with NumPy."""
    codes = np.random.randint(2**bits, size=(n_out, n_in))
    shape = (1 if per == "tensor" else n_out, 1 if isinstance(per, str) else n_in // per)
    scale = np.random.rand(*shape).astype(np.float32) / 100 + np.float32(0.001)
    zeros = np.full(shape, 2 ** (bits - 1)) if symmetric else np.random.randint(2**bits, size=shape)
    wide = [np.broadcast_to(np.repeat(part, n_in // shape[1], 1), codes.shape) for part in (zeros, scale)]
    packed = np.frombuffer(pack_reference(codes.flatten().tolist(), bits), np.uint8).copy()
    zero_point = None if symmetric else torch.from_numpy(zeros.astype(np.uint8))
    weight = (codes - wide[0]) * wide[1].astype(np.float64)
    return (torch.from_numpy(packed), torch.from_numpy(scale), zero_point), torch.from_numpy(weight)


def assert_near(actual, expected, tolerance=1e-6):
    actual, expected = actual.detach(), expected.detach()
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * size)


# Values


@each_bits
@each_symmetric
@pytest.mark.parametrize("per", ["tensor", "row", 8, 5])
def test_the_product_with_the_matrix(bits, symmetric, per):
    for n_out, n_in, rows in [(1, 40, 1), (7, 40, 3), (33, 120, 17)]:
        matrix, weight = make(n_out, n_in, bits, per, symmetric)
        x, bias, grad = torch.randn(rows, n_in), torch.randn(n_out), torch.randn(rows, n_out)
        assert_near(int_linear(x, *matrix, bits=bits, out=n_out), x.double() @ weight.t())
        assert_near(int_linear(x, *matrix, bias, bits, n_out), x.double() @ weight.t() + bias)
        assert_near(OPS.int_input_grad(grad, *matrix, bits, n_in), grad.double() @ weight)


@each_bits
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (1, 7), (3, 5), (19, 33), (50, 31), (5, 1)])
def test_rows_that_do_not_end_with_a_byte(bits, n_out, n_in):
    matrix, weight = make(n_out, n_in, bits)
    x, grad = torch.randn(4, n_in), torch.randn(4, n_out)
    assert_near(int_linear(x, *matrix, bits=bits), x.double() @ weight.t())
    assert_near(OPS.int_input_grad(grad, *matrix, bits, n_in), grad.double() @ weight)


@each_bits
@pytest.mark.parametrize(("n_in", "per"), [(40, "row"), (40, 8), (40, "tensor"), (37, "row")])
def test_several_slices(bits, n_in, per, monkeypatch):
    monkeypatch.setattr(int_matrix, "_BUFFER", 16 * 40)
    matrix, weight = make(53, n_in, bits, per)
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 0.01)]:
        x, bias, grad = (torch.randn(shape).to(dtype) for shape in ((70, n_in), (53,), (70, 53)))
        slices = list(int_matrix.row_slices(IntMatrix(*matrix, bits, 53, n_in), dtype))
        assert [part.stop - part.start for part, _ in slices] == [16, 16, 16, 5]
        assert_near(int_linear(x, *matrix, bias, bits, 53), x.double() @ weight.t() + bias, tolerance)
        assert_near(OPS.int_input_grad(grad, *matrix, bits, n_in), grad.double() @ weight, tolerance)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@each_bits
@each_symmetric
def test_codes_lie_as_a_packed_weight_stores_them(bits, symmetric, granularity):
    packed = Int(bits, granularity, symmetric).encode(torch.randn(20, 48))
    x = torch.randn(5, 48)
    y = int_linear(x, packed.codes, packed.scale, packed.zero_point, bits=bits, out=20)
    assert_near(y, x.double() @ packed.decode().double().t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per", ["row", "tensor", 16])
def test_other_dtypes(dtype, per):
    (matrix, weight), tolerance = make(24, 64, 4, per), max(torch.finfo(dtype).eps, 1e-12)
    for rows in (3, 40):
        x, grad = torch.randn(rows, 64).to(dtype), torch.randn(rows, 24).to(dtype)
        for bias in (None, torch.randn(24), torch.randn(24).to(dtype)):
            y = int_linear(x, *matrix, bias, 4, 24)
            assert y.dtype == dtype
            assert_near(y, x.double() @ weight.t() + (0 if bias is None else bias), tolerance)
        back = OPS.int_input_grad(grad, *matrix, 4, 64)
        assert back.dtype == dtype
        assert_near(back, grad.double() @ weight, tolerance)


def test_large_numbers_in_float16():
    """The whole numbers times these inputs overflow; the products do not."""
    codes = torch.full((4 * 1024,), 255, dtype=torch.uint8)
    y = int_linear(torch.full((2, 1024), 4.0).half(), codes, torch.full((4, 1), 1e-3))
    assert_near(y, torch.full((2, 4), 4096 * 0.127), 1e-3)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("per", ["row", "tensor", 12])
def test_shapes_of_the_input(shape, per):
    matrix, weight = make(10, 24, 4, per)
    x, bias = torch.randn(shape), torch.randn(10)
    assert_near(int_linear(x, *matrix, bias, 4, 10), x.double() @ weight.t() + bias)
    grad = torch.randn(*shape[:-1], 10)
    assert_near(OPS.int_input_grad(grad, *matrix, 4, 24), grad.double() @ weight)


def test_nothing_in_or_out():
    (codes, _, _), empty = make(1, 4, 8)[0], torch.empty(0, dtype=torch.uint8)
    assert int_linear(torch.randn(3, 4), empty, torch.ones(0, 1)).shape == (3, 0)
    bias = torch.randn(5)
    assert torch.equal(int_linear(torch.randn(3, 0), empty, torch.ones(5, 1), None, bias), bias.expand(3, 5))
    assert OPS.int_input_grad(torch.randn(3, 0), empty, torch.ones(0, 1), None, 8, 4).abs().sum() == 0
    assert len(codes) == 4


def test_strided_inputs():
    (codes, scale, zero_point), weight = make(10, 24, 4, 12)
    strided = codes.repeat_interleave(2)[::2], scale.t().contiguous().t(), zero_point.t().contiguous().t()
    for x in [torch.randn(24, 5).t(), torch.randn(5, 48)[:, ::2], torch.randn(24).expand(5, 24)]:
        assert_near(int_linear(x, codes, scale, zero_point, bits=4), x.double() @ weight.t())
        assert_near(int_linear(x, *strided, bits=4), x.double() @ weight.t())
    bias = torch.randn(20)[::2]
    assert_near(int_linear(x, *strided, bias, bits=4), x.double() @ weight.t() + bias)


def test_no_float_matrix_is_made(monkeypatch):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(int_matrix, "_BUFFER", 32 * 64)
    for bits, n_in in [(8, 64), (4, 64), (3, 64), (5, 61)]:
        matrix, largest = IntMatrix(*make(160, n_in, bits)[0], bits, 160, n_in), 0
        with Watch():
            int_linear_slices.linear(torch.randn(3, n_in), matrix)
            int_linear_slices.input_grad(torch.randn(3, 160), matrix)
        assert 0 < largest <= 32 * 64 + 8


def test_what_does_not_fit_is_refused():
    (codes, scale, zero_point), _ = make(10, 24, 4)
    x = torch.randn(2, 24)
    for change, message in [
        ({"x": x[:, 1:]}, "120 bytes hold 10 x 24 codes of 4 bits, not 10 x 23"),
        ({"x": x.int()}, "expected a float input"),
        ({"x": x[0, 0]}, "expected a float input"),
        ({"codes": codes.int()}, "expected codes of 2 to 8 bits, uint8"),
        ({"codes": codes.view(10, 12)}, "expected codes of 2 to 8 bits, uint8"),
        ({"bits": 1}, "expected codes of 2 to 8 bits, uint8"),
        ({"bits": 9}, "expected codes of 2 to 8 bits, uint8"),
        ({"bits": 8}, "120 bytes hold 10 x 12 codes of 8 bits, not 10 x 24"),
        ({"scale": scale[:1], "zero_point": None}, "not 1 x 24: .* one scale for all wants `out`"),
        ({"scale": scale[1:], "out": 10}, r"expected a scale float32 \[1, 1\] or \[10, groups\]"),
        ({"scale": scale.half()}, "expected a scale float32"),
        ({"scale": scale[:, 0]}, "expected a scale float32"),
        ({"scale": scale[:, :0]}, "expected a scale float32"),
        ({"scale": scale.expand(10, 5)}, "of groups that divide 24"),
        ({"scale": scale[:1].expand(1, 3), "out": 10}, "expected a scale float32"),
        ({"zero_point": zero_point.int()}, r"expected a zero point uint8 \[10, 1\], got torch.int32"),
        ({"zero_point": zero_point[:1]}, r"expected a zero point uint8 \[10, 1\], got torch.uint8 \[1, 1\]"),
        ({"bias": torch.zeros(9)}, r"expected a float bias \[10\], got torch.float32 \[9\]"),
    ]:
        values = {"x": x, "codes": codes, "scale": scale, "zero_point": zero_point, "bits": 4} | change
        with pytest.raises(ValueError, match=message):
            int_linear(**values)
        with pytest.raises(ValueError, match=message):  # the fake, too
            int_linear(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values.items()})


# Gradients


@pytest.mark.parametrize("per", ["row", "tensor", 8])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)])
def test_gradients_by_finite_differences(shape, per):
    matrix, _ = make(10, 24, 4, per)
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, 10))
    function = lambda x, bias: int_linear(x, *matrix, bias, 4, 10).sin()  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(function, (x, bias))


@pytest.mark.parametrize("needed", ["x", "b", "xb"])
def test_gradients_are_those_of_the_plain_expression(needed):
    matrix, weight = make(70, 40, 8, 8)
    x, bias, grad = torch.randn(5, 4, 40), torch.randn(70), torch.randn(5, 4, 70)
    ours = x.clone().requires_grad_("x" in needed), bias.clone().requires_grad_("b" in needed)
    int_linear(ours[0], *matrix, ours[1], 8, 70).backward(grad)
    if "x" in needed:
        assert_near(ours[0].grad, grad.double() @ weight)
    if "b" in needed:
        assert_near(ours[1].grad, grad.double().sum((0, 1)))
    assert [t.grad is not None for t in ours] == ["x" in needed, "b" in needed]


def test_the_scale_has_no_gradient():
    (codes, scale, zero_point), _ = make(10, 24, 4)
    with pytest.raises(RuntimeError, match="no gradient for its scale; detach it"):
        int_linear(torch.randn(2, 24), codes, scale.requires_grad_(), zero_point, bits=4)
    with torch.no_grad():
        int_linear(torch.randn(2, 24), codes, scale, zero_point, bits=4)


def test_gradients_of_an_empty_batch():
    matrix, _ = make(10, 24, 4)
    x, bias = torch.randn(0, 24, requires_grad=True), torch.randn(10, requires_grad=True)
    int_linear(x, *matrix, bias, 4).sum().backward()
    assert x.grad.shape == (0, 24) and torch.equal(bias.grad, torch.zeros(10))


# The operators within torch


def samples():
    found = {"int_linear": [], "int_input_grad": []}
    for bits, per, symmetric, shape in [
        (4, "row", False, (2, 3, 24)),
        (3, "tensor", True, (24,)),
        (8, 8, False, (0, 24)),
    ]:
        matrix, _ = make(10, 24, bits, per, symmetric)
        x, bias = torch.randn(shape, requires_grad=True), torch.randn(10, requires_grad=True)
        found["int_linear"].append((x, *matrix, bias if bits == 4 else None, bits, 10))
        found["int_input_grad"].append((torch.randn(*shape[:-1], 10, requires_grad=True), *matrix, bits, 24))
    return found


@pytest.mark.parametrize("name", ["int_linear", "int_input_grad"])
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", ["int_linear", "int_input_grad"])
def test_meta_tensors_have_the_real_shapes(name):
    for arguments in samples()[name]:
        with torch.no_grad():
            real = getattr(OPS, name)(*arguments)
            meta = getattr(OPS, name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic):
    (codes, scale, zero_point), _ = make(10, 24, 4)

    def run(x, bias):
        return int_linear(x, codes, scale, zero_point, bias, 4).relu().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (1, 5):
        values, grads = (torch.randn(rows, 24), torch.randn(10)), []
        for function in (run, compiled):
            x, bias = (v.clone().requires_grad_() for v in values)
            function(x, bias).backward()
            grads.append((x.grad, bias.grad))
        for expected, actual in zip(*grads, strict=True):
            assert_near(actual, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_linear_does(compiled):
    """The input and the bias, but not the scale: 1.3 does not become 1.297."""
    (codes, scale, zero_point), weight = make(10, 24, 8)
    scale, weight = torch.full_like(scale, 1.3), weight / scale.double() * 1.3
    x, bias = torch.randn(300, 24, requires_grad=True), torch.randn(10, requires_grad=True)

    def run(x, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return int_linear(x, codes, scale, zero_point, bias)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = run(x, bias)
    assert y.dtype == torch.bfloat16
    expected = x.bfloat16().double() @ weight.t() + bias.bfloat16()
    assert_near(y, expected, 0.01)
    unbiased = (y.detach().double() * expected).sum() / expected.square().sum()
    assert abs(unbiased - 1) < 5e-4
    y.float().sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    assert_near(x.grad, weight.sum(0).expand(300, 24), 0.01)
    assert_near(bias.grad, torch.full((10,), 300.0), 0.01)


def test_inference_mode():
    matrix, weight = make(10, 24, 4)
    with torch.inference_mode():
        x = torch.randn(3, 24)
        y = int_linear(x, *matrix, bits=4)
    assert y.is_inference()
    assert_near(y, x.double() @ weight.t())


# Within a packed weight


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_packed_weight_multiplies_by_it(bits, granularity, monkeypatch):
    packed = Int(bits, granularity).encode(torch.randn(12, 24))
    x, bias = torch.randn(3, 24, requires_grad=True), torch.randn(12)
    dense = packed.decode().double()
    packed.decode = lambda: pytest.fail("the whole weight")
    y = packed.linear(x, bias)
    assert_near(y, x.double() @ dense.t() + bias)
    grad = torch.randn(3, 12)
    y.backward(grad)
    assert_near(x.grad, grad.double() @ dense)
    with torch.no_grad():
        assert_near(packed.linear(x), x.double() @ dense.t())
    packed.memory, packed.decode = "fast", lambda: torch.ones(12, 24)
    with torch.no_grad():
        assert_near(packed.linear(x), x.double() @ torch.ones(24, 12).double())
    assert_near(packed.linear(x), x.double() @ dense.t())  # with gradients nothing is kept


def test_routes_on_a_gpu():
    choose, half = int_linear_cuda.choose_route, torch.float16
    kernel = [(1, half, 8, 4096), (256, torch.float32, 4, 64), (1, torch.bfloat16, 8, 7), (1, half, 4, 256, 8)]
    slices = [(257, half, 8, 64), (1, torch.float64, 8, 64), (1, half, 3, 64), (1, half, 4, 7), (1, half, 8, 64, 4)]
    assert {choose(*arguments) for arguments in kernel} == {"kernel"}
    assert {choose(*arguments) for arguments in slices} == {"slices"}
