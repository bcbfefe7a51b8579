"""A packed Linear with a quantized input: computed in integers, equal to the arithmetic in floats."""

import copy
import pickle

import pytest
import torch
from processor import needs_int8
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qnoise import PQ, Int, load, quantize, save, set_memory, train_codebooks
from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.ops import int8_backend
from lightning_qnoise.schemes import int8_products

pytestmark = needs_int8
SCHEMES = {
    "dynamic": Int(8, activation=Int(8)),
    "static": Int(8, activation=Int(8, mode="static")),
    "per tensor, symmetric": Int(8, symmetric=True, activation=Int(8, per="tensor", symmetric=True)),
    "one scale, int4": Int(4, "tensor", activation=Int(8)),
    "four bits both": Int(4, activation=Int(4)),
}


@pytest.fixture(autouse=True)
def integers(monkeypatch):
    """Also where they are exact, but so slow that floats run instead."""
    if int8_backend("cpu") is None:
        monkeypatch.setattr(int8_products, "int8_backend", lambda device_type: "int_mm")


def layer(scheme, n_in=130, n_out=127):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_out))
    return calibrate(quantize(model, scheme), [torch.randn(64, n_in)]).eval()


class FloatsOf(TorchDispatchMode):
    """Counts the float tensors of `numel` elements that operators return."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            is_large = isinstance(part, torch.Tensor) and part.numel() >= self.numel
            self.found += is_large and part.is_floating_point()
        return out


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(5, 130), (2, 3, 130), (1, 130), (130,)])
def test_equal_to_the_arithmetic_in_floats(name, shape):
    model, x = layer(SCHEMES[name]), torch.randn(shape)
    with torch.no_grad():
        found = model(x)
    packed = model[0].packed("weight")
    assert "int8" in packed._made
    expected = nn.functional.linear(packed.quantize_input(x).double(), packed.decode().double(), model[0].bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_float_weight_is_made(name):
    model, x = layer(SCHEMES[name]), torch.randn(3, 130)
    with torch.no_grad(), FloatsOf(130 * 127) as counter:
        model(x)
    assert counter.found == 0
    with FloatsOf(130 * 127) as counter:
        model[0].packed("weight").decode()  # which shows, so the test can fail
    assert counter.found


def test_gradients_groups_and_small_layers_stay_float():
    x = torch.randn(4, 128)
    for model in (
        layer(Int(8, "group:64", activation=Int(8)), 128, 128),
        layer(SCHEMES["dynamic"], 128, 16),
        layer(Int(8), 128, 128),
    ):
        with torch.no_grad():
            model(x)
        assert not model[0].packed("weight")._made
    model = layer(SCHEMES["dynamic"], 128, 128)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0 and not model[0].packed("weight")._made


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_codewords_run_in_integers_where_memory_is_fast(mode, monkeypatch):
    monkeypatch.setattr(int8_products, "_LEAST_PRODUCTS_DENSE", 0)
    scheme = PQ(block_size=5, n_centroids=16, codebook=Int(8, "tensor"), activation=Int(8, mode=mode))
    model, x = layer(scheme), torch.randn(3, 130)
    packed, expected = model[0].packed("weight"), model(x)
    assert "int8" not in packed._made
    set_memory(model, "fast")
    with FloatsOf(130 * 127) as counter:
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert "int8" in packed._made and not counter.found
    model.train()
    train_codebooks(model)
    assert "int8" not in packed._made
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not packed.is_int8


@torch.no_grad()
@pytest.mark.parametrize("per", ["tensor", "token"])
def test_every_input_has_its_own_dynamic_range(per):
    model = layer(Int(8, activation=Int(8, per=per)))
    packed = model[0].packed("weight")
    for factor in (1.0, 100.0, 0.01):
        x = factor * torch.randn(3, 130)
        expected = nn.functional.linear(packed.quantize_input(x), packed.decode(), model[0].bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * factor)


@torch.no_grad()
def test_where_floats_are_kept_few_products_stay_float():
    model = set_memory(layer(SCHEMES["static"], 256, 256), "fast")
    packed, x = model[0].packed("weight"), torch.randn(40, 256)
    expected = nn.functional.linear(packed.quantize_input(x), packed.decode(), model[0].bias)
    torch.testing.assert_close(model(x[:31]), expected[:31], rtol=1e-5, atol=1e-5)
    assert "int8" not in packed._made
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert "int8" in packed._made


@torch.no_grad()
def test_nothing_stale_is_used():
    model, x = layer(SCHEMES["static"]), torch.randn(6, 130)
    before = model(x)
    other = layer(SCHEMES["static"])
    other[0].packed("weight").codes.zero_()
    model.load_state_dict(other.state_dict())
    assert not torch.allclose(model(x), before)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert not copied[0].packed("weight")._made
        assert torch.equal(copied(x), other(x))


@torch.no_grad()
def test_file_and_dtypes(tmp_path):
    model, x = layer(SCHEMES["static"]), torch.randn(6, 130)
    assert save(model, tmp_path / "m.safetensors") == 130 * 127 + 127 * (4 + 1 + 4) + 5
    loaded = load(nn.Sequential(nn.Linear(130, 127)), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), model(x))
    half = loaded.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_torchs_encoder_layer_does_not_bypass_it():
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    model = quantize(copy.deepcopy(plain), {"linear?": Int(8, activation=Int(2))})
    calls = []
    for name in ("linear1", "linear2"):
        packed = model.get_submodule(name).packed("weight")
        packed.quantize_input = lambda x, own=packed.quantize_input: calls.append(1) or own(x)
    x = torch.randn(2, 5, 32)
    assert (model(x) - plain(x)).abs().mean() > 0.05  # two bits show
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_an_empty_batch(name):
    model = layer(SCHEMES[name])
    assert model[0].packed("weight").shape.numel() >= int8_products._LEAST
    assert model(torch.randn(0, 130)).shape == (0, 127)
