"""Ranges and second moments from data: what moves, what stays, and what is gained."""

import copy
from collections import namedtuple

import numpy as np
import pytest
import torch
from models import TiedByName
from torch import nn

from lightning_qnoise import PQ, Int, dequantize, load, quantize, save
from lightning_qnoise.calibrate import calibrate, input_moments
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import resolve

METHODS = ["minmax", "ema", "mse", "percentile", "histogram"]
STATIC = {"*": Int(8, activation=Int(8, mode="static"))}


class Net(nn.Module):
    """What has a mode of its own at every depth, and counts its runs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
        self.head = nn.Linear(8, 3)
        self.runs = 0

    def forward(self, x):
        assert not any(module.training for module in self.modules()) and not torch.is_grad_enabled()
        self.runs += 1
        return self.head(self.body(x))


def ranges_of(model):
    """Low and high of every static activation."""
    return {
        name: (
            -w.input_zero_point.item() * w.input_scale.item(),
            (2**w.scheme.activation.bits - 1 - w.input_zero_point.item()) * w.input_scale.item(),
        )
        for name, w in packed_weights(model)
        if w.scheme.activation
    }


def modes_of(model):
    return {name: module.training for name, module in model.named_modules()}


def snapshot(model):
    """All that could change: classes, objects, and values to the bit."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        [(name, id(tensor), tensor.detach().numpy().tobytes()) for name, tensor in tensors],
    )


def batches_of(n=4, rows=16, cols=6):
    return [torch.randn(rows + i, cols) * (1 + i) for i in range(n)]


def test_ranges_are_those_of_the_float_inputs():
    model, batches = Net().eval(), batches_of()
    plain = copy.deepcopy(model)
    quantize(model, {"body.0": None, **STATIC}, batches)
    with torch.no_grad():
        entering = torch.cat([plain.body(batch) for batch in batches])
    low, high = ranges_of(model)["head.weight"]
    scale = (high - low) / 255
    assert low == pytest.approx(min(entering.min().item(), 0), abs=scale)
    assert high == pytest.approx(max(entering.max().item(), 0), abs=scale)


@pytest.mark.parametrize("method", METHODS)
def test_later_layers_see_quantized_weights_and_float_inputs(method):
    model, batches = Net().eval(), batches_of()
    activation = Int(8, mode="static", range=method)
    quantize(model, {"*": Int(3, activation=activation)}, batches)
    dense = Net().eval()
    dense.load_state_dict(dequantize(copy.deepcopy(model)).state_dict())
    entering = []
    hook = dense.head.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            dense(batch)
    hook.remove()
    low, high = ranges_of(model)["head.weight"]
    if method == "ema":
        ends = np.array([[min(e.min().item(), 0), max(e.max().item(), 0)] for e in entering])
        expected = ends[0]
        for end in ends[1:]:
            expected = 0.9 * expected + 0.1 * end
        np.testing.assert_allclose((low, high), expected, atol=(high - low) / 255, rtol=0)
    else:
        largest = torch.cat(entering).max().item()
        assert high <= largest * 1.01 + 1e-6
        if method == "minmax":
            assert high == pytest.approx(largest, rel=0.01)


def test_nothing_but_calibration_moves_ranges():
    model, batches = Net(), batches_of()
    quantize(model, STATIC, batches)
    before = ranges_of(model)
    model.forward = lambda x: model.head(model.body(x))
    for mode in (True, False):
        model.train(mode)
        model(batches[0] * 100)
    assert ranges_of(model) == before
    del model.forward
    calibrate(model, [batch * 100 for batch in batches])
    after = ranges_of(model)
    assert all(after[name] != before[name] for name in before)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, [batch * 7 for batch in batches])
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert moved and all(".input_" in name for name in moved)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_also_nested_and_on_error(fails):
    model = quantize(Net(), STATIC)
    model.train()
    model.body[1].eval()
    model.body[2][1].eval()
    before = modes_of(model)
    loader = [torch.randn(4, 5 if fails else 6)]
    if fails:
        with pytest.raises(ValueError, match="6 codes of 8 bits, not 8 x 5"):
            calibrate(model, loader)
        with pytest.raises(RuntimeError):
            quantize(Net(), Int(4, rounding="gptq"), loader)
    else:
        calibrate(model, loader)
    assert modes_of(model) == before
    assert all(weight.observer is None for _, weight in packed_weights(model))


def test_an_error_in_the_middle_changes_no_range():
    model, batches = quantize(Net(), STATIC, batches_of()), batches_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def broken():
        yield batches[0] * 50
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        calibrate(model, broken())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model.eval().forward = lambda x: model.head(model.body(x))
    assert torch.isfinite(model(batches[0])).all()  # inputs are quantized again


@pytest.mark.parametrize("batches", [1, 3, 8])
def test_no_more_than_so_many_batches_are_read(batches):
    read = []

    def loader():
        for i in range(20):
            read.append(i)
            yield torch.randn(4, 6)

    model = quantize(Net(), STATIC)
    calibrate(model, loader(), batches)
    assert model.runs == batches and len(read) == batches
    read.clear()
    calibrate(quantize(Net(), Int(8, activation=Int(8))), loader())  # nothing to learn: nothing is read
    quantize(Net(), "int8", loader())
    assert not read
    for bad in (0, -1):
        with pytest.raises(ValueError, match="batches must be >= 1"):
            calibrate(model, loader(), bad)
        with pytest.raises(ValueError, match="batches must be >= 1"):
            quantize(Net(), Int(8, rounding="gptq"), loader(), bad)


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, 0), lambda x: [x, torch.ones(3)], lambda x: (x,), lambda x: Pair(x, "label")],
    ids=["tensor", "tuple", "list", "one", "named"],
)
def test_batches_are_tensors_or_begin_with_one(wrap):
    batches = batches_of()
    expected = ranges_of(quantize(torch_seeded(Net), STATIC, batches))
    assert ranges_of(quantize(torch_seeded(Net), STATIC, [wrap(batch) for batch in batches])) == expected


def test_other_batches_go_to_the_model_as_they_are():
    class OfDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, batch):
            return self.fc(batch["x"])

    model = quantize(OfDict(), STATIC, [{"x": torch.ones(2, 6)}])
    assert ranges_of(model)["fc.weight"][1] == pytest.approx(1)


def torch_seeded(make):
    torch.manual_seed(7)
    return make()


def test_tied_layers_share_the_range_of_all_of_their_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(3 * x)

    x = torch.linspace(-1, 1, 20).view(4, 5)
    model = quantize(Twice(), STATIC, [x])
    assert ranges_of(model)["a.weight"] == ranges_of(model)["b.weight"]
    assert model.a.packed("weight") is model.b.packed("weight")
    assert ranges_of(model)["a.weight"][1] == pytest.approx(3, rel=0.01)
    moment = input_moments(Twice(), resolve(Twice(), Int(4, rounding="gptq")), [x])["a.weight"]
    rows = torch.cat([x, 3 * x])
    torch.testing.assert_close(moment, rows.mT @ rows / 8)


def test_a_table_tied_to_a_linear_layer_sees_what_enters_that_layer():
    torch.manual_seed(2)
    model, ids = TiedByName(), torch.arange(20).view(4, 5)
    table = model.embed.weight.detach().clone()
    moment = input_moments(model, resolve(model, Int(4, rounding="gptq")), [ids])
    assert list(moment) == ["embed.weight"]
    torch.testing.assert_close(moment["embed.weight"], table.mT @ table / 20)
    quantize(model, {"embed": Int(4, rounding="gptq", activation=Int(8, mode="static"))}, [ids])
    decoded = model.embed.packed("weight").decode()
    low, high = ranges_of(model)["out.weight"]
    assert high == pytest.approx(decoded.max().item(), abs=(high - low) / 255)
    assert torch.equal(model.embed(ids), decoded[ids])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value):
    model = quantize(Net(), STATIC, batches_of())
    before = snapshot(model)
    bad = torch.randn(4, 6)
    bad[1, 2] = value
    with pytest.raises(ValueError, match=r"layer 'body\.0\.weight': its input .* hold NaN or Inf"):
        calibrate(model, [bad])
    assert snapshot(model) == before


class Unused(nn.Module):
    """A layer that no forward reaches."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_nothing_reaches_is_named_and_nothing_is_changed():
    model = quantize(Unused(), STATIC)
    before = snapshot(model)
    for loader in ([torch.randn(3, 6)], []):
        with pytest.raises(ValueError, match=r"layer '(un)?used\.weight': .*no input has reached it"):
            calibrate(model, loader)
        assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"layer 'unused\.weight'"):
        calibrate(model, [torch.randn(3, 6)])
    with pytest.raises(ValueError, match=r"layer 'used\.weight'"):
        calibrate(model, [torch.empty(0, 6)])


@pytest.mark.parametrize("scheme", [STATIC["*"], Int(4, rounding="gptq")], ids=["static", "gptq"])
@pytest.mark.parametrize("loader", [[], [torch.randn(3, 6)], [torch.randn(3, 5)]], ids=["empty", "unused", "wrong"])
def test_quantize_with_data_that_do_not_fit_changes_nothing(scheme, loader):
    model = Unused()
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError)):
        quantize(model, {"*": scheme}, loader)
    assert snapshot(model) == before


def test_a_one_pass_iterator_serves_both_purposes():
    """`quantize` needs data twice; what an iterator gives only once must not be lost in between."""
    model, batches = nn.Sequential(nn.Linear(6, 4)), batches_of()
    policy = {"*": Int(4, rounding="gptq", activation=Int(8, mode="static"))}
    for n in (2, 8):
        expected = quantize(copy.deepcopy(model), policy, batches, n)
        got = quantize(copy.deepcopy(model), policy, iter(batches), n)
        assert ranges_of(got) == ranges_of(expected)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_are_bit_identical(method, tmp_path):
    def make():
        return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))

    x = torch.randn(4, 3, 8)
    activation = Int(8, mode="static", range=method)
    model = quantize(
        make(), {"0": PQ(3, 8, activation=activation), "3": Int(4, activation=activation)}, [x, 2 * x, x - 1]
    )
    save(model, tmp_path / "m.safetensors")
    again = load(make(), tmp_path / "m.safetensors")
    assert torch.equal(again(x), model(x)) and ranges_of(again) == ranges_of(model)


def test_the_global_random_state_is_not_touched():
    model = Net()
    state = torch.get_rng_state()
    quantize(model, {"*": Int(4, rounding="gptq", activation=Int(8, mode="static"))}, [torch.ones(3, 6)])
    assert torch.equal(torch.get_rng_state(), state)


LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (40, 24)),
    "linear3d": (lambda: nn.Linear(24, 10), (8, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(8, 10, 3, stride=2, padding=1), (6, 8, 15)),
    "conv2d": (lambda: nn.Conv2d(4, 10, 3, dilation=2, padding="same"), (6, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, stride=(1, 2)), (6, 8, 9, 8)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 5, groups=8, padding=2), (6, 8, 15)),
    "circular": (lambda: nn.Conv2d(4, 10, 3, padding=(1, 2), padding_mode="circular"), (6, 4, 9, 8)),
    "reflect": (lambda: nn.Conv1d(8, 10, 3, padding=2, padding_mode="reflect"), (6, 8, 15)),
    "replicate": (lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="replicate"), (6, 4, 9, 8)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def smooth(shape):
    """Inputs that are correlated over the last dimension and over channels."""
    x = torch.randn(shape).cumsum(dim=-1)
    return x + (x.mean(dim=1, keepdim=True) * 3 if len(shape) > 2 else 0)


@each_layer
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_gptq_changes_the_output_less_than_rounding(make, shape, granularity):
    layer, batches = make(), [smooth(shape) for _ in range(3)]
    plain = copy.deepcopy(layer)
    errors = {}
    for rounding in ("nearest", "gptq"):
        scheme = Int(3, granularity, rounding=rounding)
        model = quantize(nn.Sequential(copy.deepcopy(layer)), {"*": scheme}, batches)
        with torch.no_grad():
            errors[rounding] = sum((model(x) - plain(x)).square().sum().item() for x in batches)
    assert errors["gptq"] < 0.75 * errors["nearest"]


def test_gptq_takes_data_and_layers_that_it_knows():
    scheme = Int(4, rounding="gptq")
    with pytest.raises(ValueError, match=r"layer '0\.weight': rounding='gptq' needs data: quantize\(\.\.\., loader="):
        quantize(nn.Sequential(nn.Linear(8, 4)), scheme)
    for layer, x in (
        (nn.Conv3d(2, 4, 2), torch.randn(2, 2, 3, 3, 3)),
        (nn.ConvTranspose2d(2, 4, 2), torch.randn(2, 2, 3, 3)),
    ):
        model = nn.Sequential(layer)
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"layer '0\.weight': .* not {type(layer).__name__}"):
            quantize(model, {"*": scheme}, [x])
        assert snapshot(model) == before
        assert not layer._forward_pre_hooks


@pytest.mark.parametrize("make", [lambda: nn.Embedding(10, 8), lambda: nn.EmbeddingBag(10, 8)], ids=["table", "bag"])
def test_a_table_has_no_inputs_to_compensate_for(make):
    model = nn.Sequential(make())
    expected = Int(4).encode(model[0].weight).decode()
    quantize(model, {"*": Int(4, rounding="gptq")}, [torch.arange(10).view(2, 5)])
    assert torch.equal(model[0].packed("weight").decode(), expected)


def test_a_layer_called_with_a_keyword_is_seen():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(input=x)

    x = torch.randn(9, 6)
    moment = input_moments(Keyword(), {"fc.weight": Int(4, rounding="gptq")}, [x])["fc.weight"]
    torch.testing.assert_close(moment, x.mT @ x / 9)
    quantize(Keyword(), STATIC, [x])


def test_a_state_that_is_no_tensor_is_no_obstacle():
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"steps": 3}

        def forward(self, x):
            return x

    model = quantize(nn.Sequential(Extra(), nn.Linear(6, 4)), STATIC, batches_of())
    assert torch.isfinite(model(torch.randn(2, 6))).all()


def test_hooks_leave_with_the_work():
    model = nn.Sequential(nn.Linear(6, 4))
    input_moments(model, {"0.weight": Int(4, rounding="gptq")}, [torch.randn(3, 6)])
    assert not model[0]._forward_pre_hooks
    with pytest.raises(RuntimeError):
        input_moments(model, {"0.weight": Int(4, rounding="gptq")}, [torch.randn(3, 5)])
    assert not model[0]._forward_pre_hooks
