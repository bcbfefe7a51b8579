"""Quantized inputs against NumPy and the dense layer; what packed weights keep of them."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qnoise import PQ, Int, load, quantize, save, size_table
from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import dynamic_grid
from lightning_qnoise.schemes.ranges import round_trip

each_bits = pytest.mark.parametrize("bits", [2, 4, 8])
each_symmetric = pytest.mark.parametrize("symmetric", [False, True])
STATIC = Int(8, mode="static")


def on_grid(values, low, high, bits, symmetric):
    """Values on the integers that cover a range, in NumPy."""
    values, top = np.asarray(values, np.float32), 2**bits - 1
    scale = np.float32(2 * max(high, -low) / (top - 1)) if symmetric else np.float32((high - low) / top)
    scale = scale if scale > 0 else np.float32(1)
    zero = np.float32(2 ** (bits - 1)) if symmetric else np.rint(np.float32(-low) / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, top) - zero) * scale


def minmax(values):
    return min(float(values.min()), 0.0), max(float(values.max()), 0.0)


def each_alone(x, n_own, bits, symmetric):
    """Every vector (or sample) of the last `n_own` dimensions on a grid of its own."""
    flat = x.float().reshape(-1, *x.shape[x.ndim - n_own :]).numpy()
    return torch.from_numpy(np.stack([on_grid(row, *minmax(row), bits, symmetric) for row in flat])).view(x.shape)


LINEAR = [(13,), (5, 13), (1, 13), (2, 3, 13), (2, 3, 2, 13)]


@each_bits
@each_symmetric
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_every_token_of_a_linear_layer_is_quantized_alone(bits, symmetric, shape):
    x = torch.randn(shape)
    packed = Int(8, activation=Int(bits, symmetric=symmetric)).encode(torch.randn(7, 13))
    got = packed.quantize_input(x)
    torch.testing.assert_close(got, each_alone(x, 1, bits, symmetric), rtol=1e-6, atol=0)
    for row, quantized in zip(x.view(-1, 13), got.view(-1, 13), strict=True):
        assert torch.equal(packed.quantize_input(row[None]), quantized[None])
    bias = torch.randn(7)
    torch.testing.assert_close(packed.linear(x, bias), F.linear(got, packed.decode(), bias))


@each_symmetric
@pytest.mark.parametrize("values", ["whole numbers", "normal", "tiny", "huge", "zero", "of one sign"])
def test_one_range_is_found_on_the_host_as_among_many(values, symmetric):
    x = torch.randn(400, 5)
    x = {
        "whole numbers": (40 * x).round(),
        "tiny": x * 1e-39,
        "huge": x * 1e37,
        "zero": 0 * x,
        "of one sign": x.abs(),
    }.get(values, x)
    packed = Int(8, activation=Int(8, symmetric=symmetric)).encode(torch.randn(7, 5))
    together = packed.quantize_input(x)
    for row, expected in zip(x, together, strict=True):
        assert isinstance(packed.input_grid(row)[1], int)
        assert torch.equal(packed.quantize_input(row), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@each_symmetric
def test_what_is_not_finite_stays_visible(bad, symmetric):
    packed = Int(8, activation=Int(8, symmetric=symmetric)).encode(torch.randn(7, 5))
    x = torch.tensor([0.5, bad, -1.0, 2.0, 0.0])
    assert not packed.quantize_input(x).isfinite().all()
    torch.testing.assert_close(packed.quantize_input(torch.stack([x, x]))[0], packed.quantize_input(x), equal_nan=True)


@each_bits
@each_symmetric
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Conv1d(3, 4, 3), (5, 3, 11)),
        (lambda: nn.Conv2d(3, 4, 3), (5, 3, 6, 7)),
        (lambda: nn.Conv2d(3, 4, 3), (3, 6, 7)),  # no batch
        (lambda: nn.Conv3d(3, 4, 2), (2, 3, 3, 4, 5)),
        (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 4, 5)),
    ],
    ids=["1d", "2d", "unbatched", "3d", "transposed"],
)
def test_every_sample_of_a_convolution_is_quantized_alone(bits, symmetric, make, shape):
    layer, x = make(), torch.randn(shape)
    x[0] *= 30
    packed = Int(8, activation=Int(bits, symmetric=symmetric)).encode(layer.weight)
    n_own = layer.weight.ndim - 1
    torch.testing.assert_close(packed.quantize_input(x), each_alone(x, n_own, bits, symmetric), rtol=1e-6, atol=0)


@each_bits
@pytest.mark.parametrize("weight", [(7, 13), (4, 3, 3, 3)], ids=str)
def test_inputs_without_a_negative_one_share_the_zero_point(bits, weight):
    x, activation = torch.randn(2, 3, 6, 13).relu(), Int(bits)
    x[1] = 0
    zero_point = dynamic_grid(x, activation, weight)[1]
    assert isinstance(zero_point, int) and zero_point == 0
    packed, n_own = Int(8, activation=activation).encode(torch.randn(weight)), len(weight) - 1
    expected = each_alone(x, n_own, bits, False)
    torch.testing.assert_close(packed.quantize_input(x), expected, rtol=1e-6, atol=0)
    x[0, 0, 0, 0] = -1e-3
    assert isinstance(dynamic_grid(x, activation, weight)[1], torch.Tensor)


@each_bits
@each_symmetric
@pytest.mark.parametrize("weight", [(7, 13), (4, 3, 3), (4, 3, 3, 3)], ids=str)
def test_per_tensor_all_elements_share_one_range(bits, symmetric, weight):
    x = torch.randn(2, 3, 13)
    packed = Int(8, activation=Int(bits, symmetric=symmetric, per="tensor")).encode(torch.randn(weight))
    expected = torch.from_numpy(on_grid(x, *minmax(x), bits, symmetric))
    torch.testing.assert_close(packed.quantize_input(x), expected, rtol=1e-6, atol=0)


@each_bits
@each_symmetric
@pytest.mark.parametrize("scheme", [Int(4), PQ(4, 4)], ids=str)
def test_static_equals_numpy_and_cuts_what_is_outside(bits, symmetric, scheme):
    activation = Int(bits, mode="static", symmetric=symmetric)
    packed = type(scheme)(**{**vars(scheme), "activation": activation}).encode(torch.randn(6, 8))
    packed.set_input_range(torch.tensor(-0.5), torch.tensor(2.0))
    x = torch.linspace(-4, 4, 5 * 8).view(5, 8)
    torch.testing.assert_close(
        packed.quantize_input(x), torch.from_numpy(on_grid(x, -0.5, 2.0, bits, symmetric)), rtol=1e-6, atol=0
    )
    assert packed.quantize_input(x).unique().numel() <= 2**bits
    assert torch.equal(packed.quantize_input(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert packed.input_scale.dtype == torch.float32 and packed.input_zero_point.dtype == torch.uint8


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "histogram"])
def test_a_dynamic_range_does_not_depend_on_what_else_is_in_the_batch(method):
    activation = Int(8, range=method)
    one_sided = torch.cat([torch.rand(1, 400), torch.tensor([[9.0]])], dim=1)
    x = torch.cat([one_sided, torch.randn(4, 401), one_sided * 1e-3])
    together = round_trip(x, *dynamic_grid(x, activation, (3, 401)), 8)
    for i in range(len(x)):
        alone = round_trip(x[i : i + 1], *dynamic_grid(x[i : i + 1], activation, (3, 401)), 8)
        assert torch.equal(together[i], alone[0]), i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", [Int(8), Int(8, per="tensor"), STATIC], ids=["token", "tensor", "static"])
def test_other_dtypes_are_rounded_in_float32_and_stay(dtype, activation):
    layer = quantize(nn.Sequential(nn.Linear(12, 5)).to(dtype), {"0": Int(8, activation=activation)})
    x = torch.randn(4, 12).to(dtype)
    calibrate(layer, [x])
    packed = layer[0].packed("weight")
    got = packed.quantize_input(x)
    assert got.dtype == dtype and layer(x).dtype == dtype
    assert torch.equal(got, packed.quantize_input(x.float()).to(dtype))
    torch.testing.assert_close(layer(x), F.linear(got, packed.decode(), layer[0].bias))
    if activation.mode == "static":
        assert packed.input_scale.dtype == torch.float32


@pytest.mark.parametrize("activation", [Int(8), Int(8, per="tensor"), STATIC], ids=["token", "tensor", "static"])
@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12)])
def test_inputs_without_elements_pass(activation, shape):
    layer = quantize(nn.Sequential(nn.Linear(12, 5)), {"0": Int(8, activation=activation)})
    assert layer(torch.empty(shape)).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("activation", [Int(8), Int(8, per="tensor")], ids=["token", "tensor"])
def test_rows_of_zeros_and_constants_are_exact(activation):
    packed = Int(8, activation=activation).encode(torch.randn(4, 6))
    for value in (0.0, 2.5, -1e-20):
        x = torch.full((3, 6), value)
        torch.testing.assert_close(packed.quantize_input(x), x, rtol=1e-6, atol=0)


def test_a_static_activation_that_was_never_calibrated_is_an_error():
    model = quantize(nn.Sequential(nn.Linear(12, 5)), {"0": Int(8, activation=STATIC)})
    x = torch.randn(3, 12)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no range yet: call calibrate\(model, loader\) first"):
            model(x)
    fresh = copy.deepcopy(model).state_dict()
    calibrate(model, [x])(x)
    model.load_state_dict(fresh)
    with pytest.raises(RuntimeError, match="no range yet"):  # also after it once had one
        model(x)


class Net(nn.Module):
    """A convolution, a linear layer and a table, all quantized."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 9, 3, padding=1)
        self.head = nn.Linear(9, 6)

    def forward(self, ids):
        return self.head(self.conv(self.embed(ids).mT).relu().mT)


IDS = torch.arange(20).view(4, 5) % 10
MIXED = {
    "conv": PQ(3, 8, activation=STATIC),
    "head": Int(4, "group:3", activation=Int(6, mode="static", range="mse", symmetric=True)),
    "embed": Int(8, activation=STATIC),
}
BARE = Int(5, activation=STATIC)


def calibrated(policy):
    return quantize(Net(), policy, loader=[IDS])


@pytest.mark.parametrize("policy", [MIXED, BARE, {"*": Int(8, activation=Int(8))}], ids=["mixed", "bare", "dynamic"])
def test_save_and_load_are_bit_identical(policy, tmp_path):
    model = calibrated(policy)
    assert save(model, tmp_path / "m.safetensors") == size_table(Net(), policy).bytes == size_table(model).bytes
    again = load(Net(), tmp_path / "m.safetensors")
    assert torch.equal(again(IDS), model(IDS))
    for (name, value), (other, expected) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, expected), name
    assert {n: w.scheme for n, w in packed_weights(again)} == {n: w.scheme for n, w in packed_weights(model)}


@pytest.mark.parametrize("policy", [MIXED, BARE], ids=["mixed", "bare"])
def test_copies_keep_the_ranges(policy):
    model = calibrated(policy)
    expected = model(IDS)
    fresh = quantize(Net(), policy)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), expected)
    before = {name: w.input_scale.clone() for name, w in packed_weights(model) if w.scheme.activation}
    assert len(before) == 2
    for other in (copy.deepcopy(model).half(), copy.deepcopy(model).bfloat16().float(), copy.deepcopy(model).double()):
        for name, weight in packed_weights(other):
            if name in before:
                assert weight.input_scale.dtype == torch.float32
                assert torch.equal(weight.input_scale, before[name])
                assert weight.input_zero_point.dtype == torch.uint8
    torch.testing.assert_close(copy.deepcopy(model).double()(IDS).float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(copy.deepcopy(model).half()(IDS)).all()


def test_a_float_checkpoint_leaves_the_ranges():
    torch.manual_seed(1)
    model, plain = calibrated(MIXED), Net()
    before = {name: weight.input_state() for name, weight in packed_weights(model) if weight.scheme.activation}
    before = {name: {key: t.clone() for key, t in state.items()} for name, state in before.items()}
    model.load_state_dict(plain.state_dict())
    for name, weight in packed_weights(model):
        if name in before:
            for key, value in weight.input_state().items():
                assert torch.equal(value, before[name][key]) and not value.float().isnan()
    assert torch.equal(model.conv.packed("weight").codes, MIXED["conv"].encode(plain.conv.weight).codes)
    model(IDS)


def test_ranges_count_in_the_state_and_in_the_file():
    scheme = Int(8, activation=STATIC)
    packed = scheme.encode(torch.randn(4, 6))
    assert list(packed.state_dict()) == ["input_scale", "input_zero_point", "codes", "scale", "zero_point"]
    assert sum(t.nbytes for t in packed.state_dict().values()) == 4 + 1 + 24 + 16 + 4
    assert set(packed.input_state()) == {"input_scale", "input_zero_point"}
    meta = scheme.empty((4, 6), device="meta")
    assert [t.shape for t in meta.state_dict().values()] == [t.shape for t in packed.state_dict().values()]
    assert list(Int(8, activation=Int(8)).encode(torch.randn(4, 6)).state_dict()) == ["codes", "scale", "zero_point"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("activation", [Int(8), STATIC], ids=["dynamic", "static"])
def test_compile_takes_the_whole_graph(activation):
    torch._dynamo.reset()
    model = quantize(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), {"*": Int(8, activation=activation)})
    x = torch.linspace(-1, 1, 5 * 16).view(5, 16)
    calibrate(model, [x])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # before any eager call
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(2 * x), model(2 * x))
    torch._dynamo.reset()
