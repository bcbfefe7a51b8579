import numpy as np
import pytest
import torch

from lightning_qnoise.ops import fake_quant_noise
from lightning_qnoise.ops.philox import philox_mask

OPS = torch.ops.lightning_qnoise
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SEED, RATE = torch.tensor([5]), torch.tensor(0.4)


def mask_of(weight, unit=1, seed=SEED, rate=RATE):
    """True for every element that is replaced, in the shape of the weight."""
    rows = weight.shape[0]
    blocks = philox_mask(seed, rate, rows, weight[0].numel() // unit)
    return blocks.repeat_interleave(unit, dim=1).view(weight.shape)


def on_grid(weight, scale, zero_point, bits):
    """The nearest integers, decoded, in NumPy's float32 and one scale after the other."""
    flat = weight.detach().float().contiguous().numpy().reshape(scale.numel(), -1)
    s = scale.contiguous().numpy().reshape(-1, 1)
    z = np.float32(2 ** (bits - 1)) if zero_point is None else zero_point.float().contiguous().numpy().reshape(-1, 1)
    codes = np.clip(np.rint(flat / s) + z, 0, 2**bits - 1)
    assert codes.dtype == np.float32
    return torch.from_numpy((codes - z) * s).view(weight.shape).to(weight.dtype)


def ends(weight, scale, zero_point, bits):
    """Low and high of every element, in the dtype of the weight."""
    size = weight.numel() // scale.numel()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if zero_point is None else zero_point.float()
    low, high = ((code - zero) * scale for code in (0, 2**bits - 1))
    return (end.reshape(-1).repeat_interleave(size).view(weight.shape).to(weight.dtype) for end in (low, high))


GRIDS = {
    "tensor": ((5, 6), (1, 1)),
    "row": ((5, 6), (5, 1)),
    "group": ((5, 6), (5, 3)),
    "convolution": ((4, 3, 3, 3), (4, 1)),
    "one": ((1, 1), (1, 1)),
}
each_grid = pytest.mark.parametrize(("shape", "of_scale"), GRIDS.values(), ids=GRIDS)


@each_dtype
@each_grid
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers(shape, of_scale, bits, symmetric, dtype):
    weight, scale = torch.randn(shape).to(dtype), torch.rand(of_scale) * 0.2 + 0.01
    for zero_dtype in (torch.uint8, torch.float32):
        zero_point = None if symmetric else torch.randint(2**bits, of_scale).to(zero_dtype)
        got = fake_quant_noise(weight, SEED, RATE, scale=scale, zero_point=zero_point, bits=bits)
        expected = torch.where(mask_of(weight), on_grid(weight, scale, zero_point, bits), weight)
        assert torch.equal(got, expected) and got.dtype == dtype


@each_dtype
@pytest.mark.parametrize("unit", [1, 4, 8, 9])
def test_blocks(unit, dtype):
    weight, table = torch.randn(5, 2, 2 * unit).to(dtype), torch.randn(7, unit).half()
    mask = mask_of(weight, unit)
    for code_dtype in (torch.uint8, torch.int16, torch.int64):
        codes = torch.randint(7, (5, 4)).to(code_dtype)
        got = fake_quant_noise(weight, SEED, RATE, unit, codes=codes, table=table)
        picked = torch.from_numpy(table.numpy()[codes.numpy()]).to(dtype).view(weight.shape)
        assert torch.equal(got, torch.where(mask, picked, weight)) and got.dtype == dtype
    mean = fake_quant_noise(weight, SEED, RATE, unit, table=table[:1])
    assert torch.equal(mean, torch.where(mask, table[0].to(dtype).repeat(4).view(2, -1), weight))
    assert torch.equal(fake_quant_noise(weight, SEED, RATE, unit), weight.masked_fill(mask, 0))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_none_and_all(rate):
    weight, scale = torch.randn(6, 8), torch.full((6, 1), 0.1)
    got = fake_quant_noise(weight, SEED, torch.tensor(rate), scale=scale, bits=4)
    assert torch.equal(got, on_grid(weight, scale, None, 4) if rate else weight)
    assert got.data_ptr() != weight.data_ptr()
    assert torch.equal(fake_quant_noise(weight, SEED, torch.tensor(rate), 4), weight * (1 - rate))


def test_halves_go_to_even():
    weight = torch.tensor([[-0.5, 0.5, 1.5, 2.5, 14.5, 15.5]])
    got = fake_quant_noise(weight, SEED, torch.ones(()), scale=torch.ones(1, 1), zero_point=torch.zeros(1, 1), bits=4)
    assert got.tolist() == [[0, 0, 2, 2, 14, 15]]


def test_what_stays_is_bit_equal():
    weight = torch.tensor([[-0.0, 1e-45, torch.inf, -torch.inf, torch.nan, 3.4e38]])
    got = fake_quant_noise(weight, SEED, torch.zeros(()), scale=torch.ones(1, 1))
    assert torch.equal(got.view(torch.int32), weight.view(torch.int32))


@each_dtype
@each_grid
def test_clamped_elements_are_cut_and_get_no_gradient(shape, of_scale, dtype):
    weight = torch.randn(shape).to(dtype).requires_grad_()
    scale, zero_point = torch.full(of_scale, 0.1), torch.randint(3, 5, of_scale).to(torch.uint8)
    arguments = {"scale": scale, "zero_point": zero_point, "bits": 3}
    got = fake_quant_noise(weight, SEED, RATE, **arguments, clamp=True)
    low, high = ends(weight, scale, zero_point, 3)
    cut = weight.detach().clamp(low, high)
    expected = torch.where(mask_of(weight), on_grid(cut, scale, zero_point, 3), cut)
    assert torch.equal(got, expected)
    outer = torch.randn(shape).to(dtype)
    got.backward(outer)
    inside = (weight.detach() >= low) & (weight.detach() <= high)
    assert torch.equal(weight.grad, outer * inside)
    weight.grad = None
    fake_quant_noise(weight, SEED, RATE, **arguments).backward(outer)
    assert torch.equal(weight.grad, outer)


def test_the_ends_of_the_range_get_their_gradient():
    weight = torch.tensor([[-1.01, -1.0, 0.0, 0.75, 0.76]], requires_grad=True)
    arguments = {"scale": torch.tensor([[0.25]]), "zero_point": torch.tensor([[4]]), "bits": 3, "clamp": True}
    for rate in (0.0, 1.0):
        weight.grad = None
        got = fake_quant_noise(weight, SEED, torch.tensor(rate), **arguments)
        assert got.tolist() == [[-1.0, -1.0, 0.0, 0.75, 0.75]]
        got.sum().backward()
        assert weight.grad.tolist() == [[0, 1, 1, 1, 0]]


@pytest.mark.parametrize("unit", [1, 4])
def test_the_gradient_is_the_identity_also_on_what_is_replaced(unit):
    weight = torch.randn(6, 8, requires_grad=True)
    outer = torch.randn(6, 8)
    got = fake_quant_noise(weight, SEED, RATE, unit)
    got.backward(outer)
    assert torch.equal(weight.grad, outer)


def test_finite_differences_where_nothing_is_replaced():
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.full((4, 1), 0.1)

    def loss(weight):
        return fake_quant_noise(weight, SEED, RATE, scale=scale, bits=4, clamp=True).square().sum()

    (grad,) = torch.autograd.grad(loss(weight), weight)
    kept = ~mask_of(weight)
    outside = (weight.abs() > 0.9) & kept
    assert outside.any() and not grad[outside].any()
    for i, j in kept.nonzero().tolist():
        step = torch.zeros(4, 6, dtype=torch.float64)
        step[i, j] = 1e-6
        with torch.no_grad():
            slope = (loss(weight + step) - loss(weight - step)) / 2e-6
        assert grad[i, j].item() == pytest.approx(slope.item(), abs=1e-6)


def strided():
    yield torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    yield torch.randn(9, 6).t()
    yield torch.randn(4, 18)[:, ::2]
    yield torch.randn(4, 1, 9).expand(4, 6, 9)


def test_strided_weights():
    for weight in strided():
        plain, rows = weight.contiguous(), len(weight)
        codes = torch.randint(5, (rows, weight[0].numel() // 3))
        scale, zero_point = torch.rand(1, rows).t(), torch.randint(16, (1, rows)).t()
        for arguments in (
            {"unit": 3, "codes": codes.t().contiguous().t(), "table": torch.randn(3, 5).t()},
            {"scale": scale, "zero_point": zero_point, "bits": 4, "clamp": True},
        ):
            got = fake_quant_noise(weight, SEED, RATE, **arguments)
            assert torch.equal(got, fake_quant_noise(plain, SEED, RATE, **arguments))
            assert got.stride() == torch.empty_like(weight).stride()
        leaf = weight.detach().requires_grad_()
        fake_quant_noise(leaf, SEED, RATE, scale=scale, bits=4, clamp=True).sum().backward()  # an expanded gradient
        low, high = ends(plain, scale, None, 4)
        assert torch.equal(leaf.grad, ((plain >= low) & (plain <= high)).float())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 4, 3, 3)])
def test_nothing_to_noise(shape):
    for arguments in ({"unit": 2}, {"scale": torch.ones(1, 1), "clamp": True}):
        weight = torch.zeros(shape, requires_grad=True)
        got = fake_quant_noise(weight, SEED, RATE, **arguments)
        got.sum().backward()
        assert got.shape == weight.grad.shape == torch.Size(shape)


def test_what_does_not_fit_is_refused():
    weight, scale = torch.zeros(4, 6), torch.ones(4, 1)
    codes, table = torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(5, 3)
    for arguments, match in [
        ({"weight": torch.zeros(6)}, r"two or more dimensions, got torch.float32 \[6\]"),
        ({"weight": torch.zeros(4, 6, dtype=torch.int32)}, "expected a float weight"),
        ({"seed": torch.tensor([1.0])}, "expected a seed int64"),
        ({"seed": torch.tensor(1)}, r"expected a seed int64 \[1\] and a rate float32 \[\], got torch.int64 \[\]"),
        ({"rate": torch.tensor([0.5])}, "expected a seed int64"),
        ({"rate": torch.tensor(0.5).double()}, "torch.float64"),
        ({"unit": 0}, "cannot be cut into blocks of 0"),
        ({"unit": 4}, "rows of 6 elements cannot be cut into blocks of 4"),
        ({"unit": 3, "scale": scale}, "leave codes and table out, and unit at 1"),
        ({"scale": scale, "table": torch.zeros(1, 1)}, "leave codes and table out"),
        ({"clamp": True}, "go with a scale, which is missing"),
        ({"zero_point": scale}, "go with a scale, which is missing"),
        ({"scale": scale[:3]}, r"expected a scale float32 \[4, groups\] or \[1, 1\], .* got torch.float32 \[3, 1\]"),
        ({"scale": torch.ones(4, 4)}, "groups a divisor of 6"),
        ({"scale": torch.ones(4, 0)}, "groups a divisor of 6"),
        ({"scale": scale.half()}, "torch.float16"),
        ({"scale": scale, "zero_point": torch.ones(1, 1)}, r"expected a zero point \[4, 1\], .* got \[1, 1\]"),
        ({"scale": scale, "bits": 17}, "expected 1 to 16 bits, got 17"),
        ({"unit": 3, "codes": codes}, "codes go with a table"),
        ({"unit": 3, "table": table}, r"expected a table \[1, 3\], got \[5, 3\]"),
        ({"unit": 2, "table": table, "codes": codes}, r"expected a table \[K, 2\], got \[5, 3\]"),
        ({"unit": 3, "table": table, "codes": codes[:3]}, r"expected integer codes \[4, 2\], got torch.uint8 \[3, 2\]"),
        ({"unit": 3, "table": table, "codes": codes.float()}, "expected integer codes"),
    ]:
        with pytest.raises(ValueError, match=match):
            fake_quant_noise(**{"weight": weight, "seed": SEED, "rate": RATE} | arguments)


# The operator within torch


def samples():
    weight, scale = torch.randn(4, 6, requires_grad=True), torch.rand(4, 2) + 0.1
    codes, table = torch.randint(5, (4, 2)).to(torch.uint8), torch.randn(5, 3)
    half = torch.randn(4, 2, 3).half().requires_grad_()
    last = torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    return {
        "fake_quant_noise": [
            (weight, SEED, RATE, 1, scale, None, 4, None, None, False),
            (weight, SEED, RATE, 1, scale, torch.randint(16, (4, 2)), 4, None, None, True),
            (half, SEED, RATE, 3, None, None, 8, codes, table, False),
            (last, SEED, RATE, 9, None, None, 8, None, torch.randn(1, 9), False),
            (weight.detach(), SEED, RATE, 2, None, None, 8, None, None, False),
        ],
        "fake_quant_noise_grad": [(torch.randn(4, 6), weight.detach(), scale, None, 4)],
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", samples())
def test_meta_tensors_have_the_real_shapes(name):
    operator = getattr(OPS, name).default
    for arguments in samples()[name]:
        with torch.no_grad():
            real = operator(*arguments)
            meta = operator(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_a_compiled_graph_serves_all_seeds_and_rates():
    torch._dynamo.reset()
    scale, seed, rate, graphs = torch.full((6, 1), 0.1), torch.tensor([0]), torch.tensor(0.0), []

    def run(weight):
        pruned = fake_quant_noise(weight, seed, rate, 4)
        return fake_quant_noise(pruned, seed, rate, scale=scale, bits=4, clamp=True)

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(run, fullgraph=True, backend=count)
    weight = torch.randn(6, 8)
    seen = set()
    for step in range(5):
        seed.fill_(step), rate.fill_(0.1 + 0.2 * step)
        ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
        got, expected = compiled(ours), run(theirs)
        got.square().sum().backward(), expected.square().sum().backward()
        assert torch.equal(got, expected) and torch.equal(ours.grad, theirs.grad)
        seen.add(tuple(got.flatten().tolist()))
    assert len(graphs) == 1 and len(seen) == 5


def test_gradients_of_the_compiled_operator():
    torch._dynamo.reset()
    scale = torch.full((6, 2), 0.1)

    def run(weight):
        return fake_quant_noise(weight, SEED, RATE, scale=scale, bits=4, clamp=True) * weight

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        weight = torch.linspace(-1, 1, 48).view(6, 8).requires_grad_()
        function(weight).sum().backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_no_second_derivative_where_it_is_clamped():
    weight, scale = torch.randn(4, 6, requires_grad=True), torch.full((1, 1), 0.1)
    for clamp in (False, True):
        y = fake_quant_noise(weight, SEED, RATE, scale=scale, bits=4, clamp=clamp)
        (first,) = torch.autograd.grad((y**2).sum(), weight, create_graph=True)
        if clamp:
            with pytest.raises(RuntimeError, match="no second derivative"):
                first.sum().backward()
        else:  # the gradient is 2 y, and that of y is the identity
            (second,) = torch.autograd.grad(first.sum(), weight)
            assert torch.equal(second, torch.full((4, 6), 2.0))


def test_autocast_leaves_the_dtype():
    weight = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = fake_quant_noise(weight, SEED, RATE, 2)
        got.sum().backward()
    assert got.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(got, fake_quant_noise(weight, SEED, RATE, 2))


def test_inference_mode_and_function_transforms():
    weight = torch.randn(4, 6)
    with torch.inference_mode():
        assert fake_quant_noise(weight, SEED, RATE, 2).is_inference()
    for arguments in ({"unit": 2}, {"scale": torch.full((1, 1), 0.1), "bits": 4, "clamp": True}):
        loss = lambda w, a=arguments: fake_quant_noise(w, SEED, RATE, **a).square().sum()  # noqa: E731
        leaf = weight.clone().requires_grad_()
        loss(leaf).backward()
        assert torch.equal(torch.func.grad(loss)(weight), leaf.grad)
