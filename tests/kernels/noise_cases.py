import pytest
import torch
from kernels.random_weights import poison

from lightning_qnoise.kernels.integer_noise import integer_grad, integer_noise
from lightning_qnoise.kernels.noise import block_noise
from lightning_qnoise.ops.noise_library import _cuda, _grad_cuda
from lightning_qnoise.ops.noise_reference import noise, noise_grad
from lightning_qnoise.ops.philox import philox_mask
from lightning_qnoise.schemes.ranges import affine_round

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SEED, RATE = torch.tensor([-8612345678901234567]), torch.tensor(0.4)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def grid(weight, groups=1, symmetric=False, per_tensor=False):
    shape = (1, 1) if per_tensor else (len(weight), groups)
    zero_point = None if symmetric else torch.randint(16, shape, dtype=torch.uint8)
    return torch.rand(shape) * 0.2 + 0.01, zero_point


def cut(x, dtype):
    """The conversion from float32 in the interpreter, which rounds bfloat16 towards zero."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("rate", [-1.0, 0.0, 2**-24, 0.05, 0.5, 1 - 2**-24, 1.0, 7.0])
def test_the_mask_is_the_reference_bit_by_bit(seed, rate):
    seed, rate = torch.tensor([seed]), torch.tensor(rate)
    found = block_noise(torch.ones(6, 45), seed, rate, 1, None, None)
    assert torch.equal(found == 0, philox_mask(seed, rate, 6, 45))


@pytest.mark.parametrize(("rows", "n_blocks", "unit"), [(3, 1, 1), (9, 3, 9), (70, 33, 1), (2, 600, 8), (3, 5, 200)])
def test_the_mask_of_any_tiling(rows, n_blocks, unit):
    """Several programs, along rows, along columns and within long blocks."""
    found = block_noise(torch.ones(rows, n_blocks * unit), SEED, RATE, unit, None, None) == 0
    expected = philox_mask(SEED, RATE, rows, n_blocks)
    assert torch.equal(found, expected.repeat_interleave(unit, dim=1))


@each_dtype
@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("unit", "code_dtype"), [(1, torch.uint8), (4, torch.int16), (8, torch.int32), (9, torch.int64)]
)
def test_codes_of_a_codebook(unit, code_dtype, table_dtype, dtype):
    weight, table = torch.randn(5, 7 * unit).to(dtype), torch.randn(12, unit).to(table_dtype)
    codes = torch.randint(12, (5, 7)).to(code_dtype)
    found = block_noise(weight, SEED, RATE, unit, codes, table)
    mask = philox_mask(SEED, RATE, 5, 7)[..., None]
    expected = torch.where(mask, cut(table.float(), dtype)[codes.long()], weight.view(5, 7, unit))
    assert torch.equal(found, expected.view(5, -1)) and found.dtype == dtype


@pytest.mark.parametrize(("rows", "n_blocks", "unit"), [(40, 70, 4), (3, 300, 9), (2, 9, 130)])
def test_codes_of_several_programs(rows, n_blocks, unit):
    weight, table = torch.randn(rows, n_blocks * unit), torch.randn(300, unit)
    codes = torch.randint(300, (rows, n_blocks)).int()
    mask = philox_mask(SEED, RATE, rows, n_blocks)[..., None]
    expected = torch.where(mask, table[codes], weight.view(rows, n_blocks, unit))
    assert torch.equal(block_noise(weight, SEED, RATE, unit, codes, table), expected.view(rows, -1))


@each_dtype
@pytest.mark.parametrize("unit", [1, 4, 8, 9, 80])
def test_one_block_for_all_and_zeros(unit, dtype):
    weight, table = torch.randn(5, 7 * unit).to(dtype), torch.randn(1, unit).to(dtype)
    mask = philox_mask(SEED, RATE, 5, 7)[..., None]
    for row in (table, None):
        found = block_noise(weight, SEED, RATE, unit, None, row)
        expected = torch.where(mask, torch.zeros(1, unit, dtype=dtype) if row is None else row, weight.view(5, 7, unit))
        assert torch.equal(found, expected.view(5, -1))


INTEGERS = {
    "per row": ((5, 7), {}),
    "per tensor": ((5, 7), {"per_tensor": True}),
    "groups": ((5, 12), {"groups": 3}),
    "groups of one": ((3, 5), {"groups": 5}),
    "groups of the only row": ((1, 12), {"groups": 3}),
    "symmetric": ((5, 7), {"symmetric": True}),
    "one column": ((9, 1), {}),
    "several programs": ((40, 130), {}),
    "a long row": ((2, 2100), {"groups": 2}),
}
each_grid = pytest.mark.parametrize(("shape", "options"), INTEGERS.values(), ids=INTEGERS)


@each_dtype
@each_grid
def test_integers_are_those_of_the_scheme(shape, options, dtype):
    weight = torch.randn(shape).to(dtype)
    scale, zero_point = grid(weight, **options)
    s, z = scale[..., None], 8.0 if zero_point is None else zero_point[..., None].float()
    codes = affine_round(weight.float().view(*scale.shape, -1), s, z, bits=4)
    expected = cut(((codes - z) * s).view(shape), dtype)
    found = integer_noise(weight, SEED, RATE, scale, zero_point, 4, False)
    assert torch.equal(found, torch.where(philox_mask(SEED, RATE, *shape), expected, weight))
    assert torch.equal(integer_noise(weight, SEED, torch.ones(()), scale, zero_point, 4, False), expected)


@each_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_clamped_integers_and_their_gradient(shape, options, dtype):
    weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    scale, zero_point = grid(weight, **options)
    found = integer_noise(weight, SEED, RATE, scale, zero_point, 4, True)
    assert torch.equal(found, noise(weight, SEED, RATE, 1, scale, zero_point, 4, None, None, True))
    assert not torch.equal(found, noise(weight, SEED, RATE, 1, scale, zero_point, 4, None, None, False))
    expected = noise_grad(grad, weight, scale, zero_point, 4)
    assert torch.equal(integer_grad(grad, weight, scale, zero_point, 4), expected)
    assert 0 < expected.count_nonzero() < expected.numel()


def test_halves_go_to_even_and_what_is_far_outside_to_an_end():
    values = [-0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 14.5, 15.5, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]
    weight = torch.tensor([values])
    expected = torch.tensor([[0, 0, 2, 2, 6, 8, 14, 15, 15, 0, 15, 0, torch.nan]])
    for clamp in (False, True):
        found = integer_noise(weight, SEED, torch.ones(()), torch.ones(1, 1), torch.zeros(1, 1), 4, clamp)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 16])
def test_every_code(bits):
    codes = torch.arange(-3.0, 2**bits + 3).view(1, -1)
    weight = torch.cat([codes, codes + 0.49, codes + 0.5], dim=1) * 0.37 - 1
    scale, zero_point = torch.tensor([[0.37]]), torch.tensor([[1.0 / 0.37]]).round()
    found = integer_noise(weight, SEED, torch.ones(()), scale, zero_point, bits, False)
    assert torch.equal(found, (affine_round(weight, scale, zero_point, bits) - zero_point) * scale)


def test_nothing_to_noise():
    for shape in ((0, 4), (3, 0)):
        weight = torch.zeros(shape)
        assert block_noise(weight, SEED, RATE, 4, None, None).shape == shape
        scale = torch.ones(1, 1)
        assert integer_noise(weight, SEED, RATE, scale, None, 4, False).shape == shape
        assert integer_grad(weight, weight, scale, None, 4).shape == shape


def test_the_route_of_gpus_takes_any_strides():
    shape = (4, 6, 3, 3)
    channels_last = torch.randn(shape).to(memory_format=torch.channels_last)
    for weight in (torch.randn(shape), channels_last, torch.randn(6, 9).t(), torch.randn(4, 1, 5).expand(4, 3, 5)):
        rows, cols = len(weight), weight[0].numel()
        half, table = cols // 3, torch.randn(7, 6)[:, ::2]
        codes = torch.randint(7, (half, rows)).t()
        scale, zero_point = (torch.rand(3, rows) / 4).t(), torch.randint(16, (3, rows)).t()
        cases = [(3, None, None, 8, codes, table, False), (1, scale, zero_point, 4, None, None, True)]
        for case in cases:
            found, expected = _cuda(weight, SEED, RATE, *case), noise(weight, SEED, RATE, *case)
            assert torch.equal(found, expected) and found.stride() == expected.stride()
        grad = torch.randn(()).expand(weight.shape)
        found = _grad_cuda(grad, weight, scale, zero_point, 4)
        expected = noise_grad(grad, weight, scale, zero_point, 4)
        assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_float64_takes_the_reference():
    weight, scale = torch.randn(3, 5).double(), torch.full((1, 1), 0.1)
    arguments = (SEED, RATE, 1, scale, None, 4, None, None, True)
    assert torch.equal(_cuda(weight, *arguments), noise(weight, *arguments))
    assert torch.equal(_grad_cuda(weight, weight, scale, None, 4), noise_grad(weight, weight, scale, None, 4))


def test_arguments_are_checked():
    weight, scale = torch.zeros(4, 6), torch.ones(4, 1)
    codes, table = torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(5, 3)
    for bad, match in [
        ((weight.double(), SEED, RATE, 3, codes, table), "float64"),
        ((weight, SEED, RATE, 3, codes, table.double()), "float64"),
        ((torch.zeros(6, 4).t(), SEED, RATE, 3, codes, table), "weight has to be contiguous"),
        ((weight, SEED, RATE, 3, codes[:, :1], table), "codes has to be contiguous"),
        ((weight, SEED, RATE, 3, codes[:3], table), r"codes are \[4, 2\], got \[3, 2\]"),
        ((weight, SEED, RATE, 4, codes, table), "blocks of 4 do not fit"),
        ((weight, SEED, RATE, 2, codes, table), r"blocks of 2 do not fit .* a table \[5, 3\]"),
        ((weight, SEED.to("meta"), RATE, 3, codes, table), "on one device"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            block_noise(*bad)
    for bad, match in [
        ((weight.double(), SEED, RATE, scale, None), "float64"),
        ((weight, SEED, RATE, scale.double(), None), r"a scale is float32 \[4, groups\]"),
        ((weight, SEED, RATE, torch.ones(1, 2), None), r"and groups divides 6; got torch.float32 \[1, 2\]"),
        ((weight, SEED, RATE, torch.ones(4, 4), None), "and groups divides 6"),
        ((weight, SEED, RATE, scale, torch.ones(4, 2)), r"a zero point is \[4, 1\], as the scale, got \[4, 2\]"),
        ((weight, SEED, RATE.to("meta"), scale, None), "on one device"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            integer_noise(*bad, 4, False)
    with pytest.raises(ValueError, match=r"the gradient is contiguous \[4, 6\], got \[6, 4\]"):
        integer_grad(torch.zeros(6, 4), weight, scale, None, 4)
