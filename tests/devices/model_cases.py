"""Models on a device that is not the CPU: what is made for them is made there, and has the same numbers."""

import copy

import pytest
import torch
from devices.device import GPU, IS_REAL, at_work, no_waits
from processor import HAS_INT8, needs_int8
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qnoise import PQ, Int, calibrate, dequantize, load, quantize, save, set_memory, train_codebooks
from lightning_qnoise.ops import int8_weight
from lightning_qnoise.schemes import int8_products

LAYERS = {
    "Linear": (lambda: nn.Linear(40, 24), (5, 40)),
    "large Linear": (lambda: nn.Linear(516, 252), (4, 33, 516)),
    "Conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (4, 8, 6, 6)),
    "groups": (lambda: nn.Conv2d(8, 16, 4, padding=1, groups=2), (4, 8, 6, 6)),
    "Conv1d": (lambda: nn.Conv1d(8, 16, 4), (4, 8, 9)),
    "Embedding": (lambda: nn.Embedding(50, 16), None),
    "Transformer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 5, 32)),
}
SCHEMES = {
    "int8": Int(8),
    "int3": Int(3),
    "int4, groups": Int(4, "group:4", activation=Int(8)),
    "int4, tensor": Int(4, "tensor"),
    "mse": Int(4, range="mse"),
    "histogram": Int(4, range="histogram"),
    "percentile": Int(4, range="percentile"),
    "per token": Int(8, activation=Int(8)),
    "per tensor": Int(8, activation=Int(8, per="tensor")),
    "symmetric": Int(8, symmetric=True, activation=Int(8, symmetric=True)),
    "per token, mse": Int(8, activation=Int(8, range="mse")),
    "static": Int(8, activation=Int(8, mode="static")),
    "static, ema": Int(8, activation=Int(8, mode="static", range="ema")),
    "static, percentile": Int(8, activation=Int(8, mode="static", range="percentile")),
    "pq": PQ(4, 16),
    "pq, 3 bits": PQ(2, 6),
    "pq, int8": PQ(4, 16, codebook=Int(8, "tensor"), activation=Int(8)),
    "pq, int8, static": PQ(4, 16, codebook=Int(8), activation=Int(8, mode="static")),
}


@pytest.fixture(autouse=True)
def device():
    with at_work():
        yield


@pytest.fixture
def cublas(monkeypatch):
    """Products in integers as on CUDA, where what simulates them is exact."""
    if not HAS_INT8:
        return
    for module in (int8_weight, int8_products):
        found = module.int8_backend
        choose = lambda kind, found=found: "cublas" if kind == "gpu" else found(kind)  # noqa: E731
        monkeypatch.setattr(module, "int8_backend", choose)


def twins(name, scheme, memory="lean"):
    """A packed model on the CPU, one on the device (packed there, if it draws as the CPU does), and their inputs."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).eval(), torch.randn(shape) if shape else torch.randint(50, (4, 5))
    twin = copy.deepcopy(model).to(GPU)

    def packed(model, x):
        torch.manual_seed(1)
        return set_memory(quantize(model, scheme, [x]), memory)

    host = packed(model, x)
    return host, copy.deepcopy(host).to(GPU) if IS_REAL else packed(twin, x.to(GPU)), x, x.to(GPU)


def assert_same(actual, expected, tolerance=1e-4):
    """The scale of an input is multiplied by on CPUs, and divided by elsewhere: a code in 200,000 is another."""
    assert actual.device == GPU and actual.dtype == expected.dtype
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual.detach().cpu(), expected.detach(), rtol=0, atol=tolerance * largest)


def test_mixing_is_refused():
    x = torch.randn(3, 4).to(GPU)
    assert_same(x @ x.T * torch.tensor(2.0), x.cpu() @ x.cpu().T * 2)
    with pytest.raises(RuntimeError, match=r"several devices|on the same device"):
        x + torch.randn(3, 4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing(scheme):
    """The weights are as near to the float ones as those that the CPU packs."""
    make, shape = LAYERS["Linear"]
    layer, errors = make(), []
    for device in (torch.device("cpu"), GPU):
        model = nn.Sequential(copy.deepcopy(layer)).to(device)
        quantize(model, SCHEMES[scheme], [torch.randn(shape).to(device)])
        errors.append((model[0].weight.cpu() - layer.weight).square().sum().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.usefixtures("cublas")
@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_of_the_cpu_and_no_wait(name, scheme, memory):
    """From the second forward on the host never waits for the device."""
    host, model, x, on_device = twins(name, SCHEMES[scheme], memory)
    assert {tensor.device for tensor in model.state_dict().values()} == {GPU}
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            model(on_device)
            with no_waits():
                y = model(on_device)
            expected = host(x)
            assert_same(y, expected, 1e-3)
    if y.requires_grad:
        (y * y.detach().cos()).sum().backward()  # LayerNorm has no gradient for a plain sum
        (expected * expected.detach().cos()).sum().backward()
        for parameter, other in zip(model.parameters(), host.parameters(), strict=True):
            assert_same(parameter.grad, other.grad, 1e-3)


class Products(TorchDispatchMode):
    """Notes the matrices of every product of integers."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._int_mm.default:
            left, right = args[:2]
            assert left.dtype == right.dtype == torch.int8
            assert len(left) > 16 and not left.shape[1] % 8 and not right.shape[1] % 8  # what cuBLAS takes
            assert left.is_contiguous() and right.t().is_contiguous()
            self.sizes.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@needs_int8
@pytest.mark.usefixtures("cublas")
@pytest.mark.parametrize("scheme", ["per token", "per tensor", "symmetric", "static", "pq, int8"])
@pytest.mark.parametrize("rows", [1, 17, 132])
def test_a_large_linear_layer_runs_in_integers(scheme, rows):
    memory = "fast" if scheme == "pq, int8" else "lean"
    host, model, x, on_device = twins("large Linear", SCHEMES[scheme], memory)
    x, on_device = x.view(-1, 516)[:rows], on_device.view(-1, 516)[:rows]
    with Products() as products:
        y = model(on_device)
    if memory == "lean" or rows > 16:  # fewer take the floats that are kept
        assert products.sizes == [(max(17, rows), 520, 256)]
    assert_same(y, host(x), 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "per token", "static", "pq", "pq, int8"])
def test_models_move(scheme, tmp_path):
    """Between devices, to files and back, and to other dtypes."""
    host, model, x, on_device = twins("Transformer", SCHEMES[scheme])
    expected = model(on_device)
    assert torch.equal(copy.deepcopy(model)(on_device).cpu(), expected.cpu())
    save(model, tmp_path / "model.safetensors")
    for device in (GPU, torch.device("cpu")):
        loaded = load(nn.Sequential(LAYERS["Transformer"][0]()).eval().to(device), tmp_path / "model.safetensors")
        assert_same(loaded(x.to(device)).to(GPU), expected.cpu())
    for memory in ("fast", "lean"):
        set_memory(model, memory).cpu()
        assert_same(model(x).to(GPU), expected.cpu())
        assert_same(model.to(GPU)(on_device), expected.cpu())
    model.load_state_dict(host.state_dict())
    assert_same(model(on_device), host(x))
    half = copy.deepcopy(model).bfloat16()
    assert_same(half(on_device.bfloat16()).float(), expected.cpu(), 0.05)
    if scheme in ("int8", "pq"):
        assert_same(dequantize(model)(on_device), expected.cpu())


def test_calibration_takes_batches_of_both_devices():
    for batch in (torch.randn(6, 40), torch.randn(6, 40).to(GPU)):
        host, model, x, on_device = twins("Linear", SCHEMES["static"])
        calibrate(host, [batch.cpu()])
        calibrate(model, [batch])
        assert_same(model(on_device), host(x), 1e-3)


def test_codebooks_are_trained():
    models = twins("Linear", SCHEMES["pq"])
    for model, x in zip(models[:2], models[2:], strict=True):
        optimizer = torch.optim.SGD(train_codebooks(model).parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    host, model, x, on_device = models
    assert_same(model(on_device), host(x))


@pytest.mark.parametrize("granularity", ["channel", "group:4"])
def test_gptq(granularity):
    host, model, x, on_device = twins("Transformer", Int(4, granularity, rounding="gptq"))
    assert_same(model(on_device), host(x), 1e-3)
