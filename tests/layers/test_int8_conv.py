"""A packed Conv2d: in integers where its input is quantized, with its channels last where its images are few."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

from lightning_qnoise import PQ, Int, load, quantize, save, set_memory, train_codebooks
from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.demos import DigitsClassifier
from lightning_qnoise.ops import DenseKernel, Int8Kernel, int8_backend
from lightning_qnoise.schemes import int8_products
from lightning_qnoise.schemes.fast_conv import Route

integers = pytest.mark.skipif(int8_backend("cpu") != "onednn", reason="this processor has no exact int8 kernels")
SCHEMES = {
    "dynamic": Int(8, activation=Int(8)),
    "static": Int(8, activation=Int(8, mode="static")),
    "per tensor, symmetric": Int(8, symmetric=True, activation=Int(8, per="tensor", symmetric=True)),
    "one scale, int4": Int(4, "tensor", activation=Int(8)),
    "int8 codewords": PQ(block_size=3, n_centroids=16, codebook=Int(8, "tensor"), activation=Int(8)),
}


class Standardized(nn.Conv2d):
    """A convolution that changes its weight in every forward."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


def layer(scheme, *args, kind=nn.Conv2d, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(kind(*args, **kwargs))
    return calibrate(quantize(model, scheme), [torch.randn(8, args[0], 12, 12)]).eval()


def kernels(packed):
    return [value.kernel for value in packed._made.values() if isinstance(getattr(value, "kernel", None), Int8Kernel)]


def runs_in_integers(packed):
    return bool(kernels(packed))


@pytest.fixture
def _small_pays(monkeypatch):
    monkeypatch.setattr(int8_products.Int8Products, "_pays", lambda *args: True)


@integers
@pytest.mark.usefixtures("_small_pays")
@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": (2, 1), "padding": (0, 2), "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_integers_are_equal_to_the_arithmetic_in_floats(name, options, memory):
    model = set_memory(layer(SCHEMES[name], 5, 7, 3, **options), memory)
    packed, x = model[0].packed("weight"), torch.randn(3, 5, 12, 12)
    with torch.no_grad():
        found = model(x)
        assert runs_in_integers(packed) == (memory == "fast" or name != "int8 codewords")
        values, weight = packed.quantize_input(x).double(), packed.decode().double()
        bias = None if model[0].bias is None else model[0].bias.double()
        expected = model[0]._conv_forward(values, weight, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()


@pytest.mark.usefixtures("_small_pays")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.Conv2d, {"groups": 2}),
        (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}),
        (Standardized, {"padding": 1}),
    ],
    ids=str,
)
def test_special_convolutions_decode(kind, options):
    plain = kind(4, 6, 3, **options)
    model = layer(Int(8, activation=Int(8)), 4, 6, 3, kind=kind, **options)
    plain.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
    packed, x = model[0].packed("weight"), torch.randn(3, 4, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(packed.quantize_input(x)))
    assert not runs_in_integers(packed)


@pytest.mark.usefixtures("_small_pays")
def test_gradients_and_single_images_decode():
    model, x = layer(Int(8, activation=Int(8)), 4, 6, 3), torch.randn(2, 4, 12, 12, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert model(x[0].detach()).shape == (6, 10, 10)
    assert not runs_in_integers(model[0].packed("weight"))


@integers
@torch.no_grad()
def test_small_convolutions_decode_and_large_ones_do_not():
    for size, images, in_integers in [(12, 8, True), (3, 4, False)]:
        model = layer(Int(8, activation=Int(8)), 64, 64, 3, padding=1)
        model(torch.randn(images, 64, size, size))
        assert runs_in_integers(model[0].packed("weight")) == in_integers


@integers
@pytest.mark.usefixtures("_small_pays")
@torch.no_grad()
def test_other_sizes_and_a_tied_weight_find_their_kernels():
    model = layer(SCHEMES["static"], 64, 64, 3, padding=1)
    packed, strided = model[0].packed("weight"), copy.deepcopy(model)
    strided[0].stride = (2, 2)
    strided[0]._modules["weight"] = packed
    for sizes in [(8, 64, 12, 12), (4, 64, 30, 20), (8, 64, 12, 12)]:
        x = torch.randn(sizes)
        values, weight = packed.quantize_input(x), packed.decode()
        for tied in (model, strided):
            expected = F.conv2d(values, weight, tied[0].bias, tied[0].stride, tied[0].padding)
            torch.testing.assert_close(tied(x), expected, rtol=1e-4, atol=1e-5)
        assert len(kernels(packed)) == 2 and {kernel.sizes for kernel in kernels(packed)} == {x.shape}


@integers
@torch.no_grad()
def test_another_range_is_seen():
    model, x = layer(SCHEMES["static"], 64, 64, 3), torch.randn(8, 64, 12, 12)
    before, packed = model(x), model[0].packed("weight")
    packed.set_input_range(torch.tensor(-0.1), torch.tensor(0.1))
    narrow = model(x)
    assert not torch.allclose(before, narrow, atol=0.1)
    torch.testing.assert_close(narrow, F.conv2d(packed.quantize_input(x), packed.decode(), model[0].bias))


@integers
@torch.no_grad()
def test_a_second_calibration_sees_the_inputs():
    model, x = layer(SCHEMES["static"], 64, 64, 3, padding=1), torch.randn(8, 64, 12, 12)
    model(x)
    packed = model[0].packed("weight")
    assert runs_in_integers(packed)
    calibrate(model, [0.1 * x])
    low, high = (0.1 * end.item() for end in (x.min(), x.max()))
    torch.testing.assert_close(packed.input_scale.item(), (high - low) / 255)
    assert not runs_in_integers(packed)


@torch.no_grad()
def test_a_trained_codebook_is_read_anew_and_empty_inputs_pass():
    model, x = layer(PQ(block_size=9, n_centroids=16), 64, 64, 3, padding=1), torch.randn(8, 64, 2, 2)
    train_codebooks(set_memory(model, "fast"))
    packed = model[0].packed("weight")
    for _ in range(2):
        torch.testing.assert_close(
            model(x), F.conv2d(x, packed.decode(), model[0].bias, padding=1), rtol=1e-4, atol=1e-5
        )
        packed.codebook.mul_(1.5)  # as an optimizer does
    for memory in ("lean", "fast"):
        set_memory(train_codebooks(model, False), memory)
        assert model(x[:0]).shape == (0, 64, 2, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x + 1), model(x + 1), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        for size in range(1, 80):  # what is remembered stays bounded
            model(torch.randn(1, 64, 1, size))
        assert len(packed._made) < 70


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@torch.no_grad()
@pytest.mark.parametrize("scheme", [Int(8), SCHEMES["static"], PQ(block_size=9, n_centroids=16)], ids=str)
def test_few_positions_of_several_images_read_a_packed_weight(scheme):
    model = layer(scheme, 64, 64, 3, padding=1)
    fast = set_memory(copy.deepcopy(model), "fast")
    packed = fast[0].packed("weight")

    def packed_for():
        kernels = [getattr(value, "kernel", None) for value in packed._made.values()]
        return {kernel.sizes for kernel in kernels if isinstance(kernel, DenseKernel)}

    for shape in [(8, 64, 2, 2), (5, 64, 2, 3), (8, 64, 2, 2)]:
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert packed_for() == {x.shape}  # of one size at a time
    packed.load_state_dict(packed.state_dict())
    assert not packed_for()
    fast[0].padding = "same"
    torch.testing.assert_close(fast(x), F.conv2d(packed.quantize_input(x), packed.decode(), fast[0].bias, padding=1))
    fast.bfloat16()(x.bfloat16())
    assert not packed_for()


@torch.no_grad()
@pytest.mark.parametrize("scheme", [Int(8), Int(8, activation=Int(8)), PQ(block_size=9, n_centroids=16)], ids=str)
def test_few_positions_read_the_weight_with_its_channels_last(scheme):
    model = layer(scheme, 32, 24, 3, padding=1, stride=2)
    fast = set_memory(copy.deepcopy(model), "fast")
    packed = fast[0].packed("weight")
    for shape, kept in [((1, 32, 8, 8), 1), ((1, 32, 30, 30), 2), ((16, 32, 8, 8), 2)]:
        x = torch.randn(shape)
        y = fast(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        assert y.is_contiguous() and sum(isinstance(key, torch.memory_format) for key in packed._made) == kept
    x = torch.randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    assert fast(x).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 32, 3), {"padding": 1, "bias": False}),  # unfolded
        ((33, 48, 1), {"stride": 2}),  # pixelwise
        ((32, 24, 3), {"padding": 1, "stride": 2}),  # channels-last
        ((64, 64, 3), {"padding": 1, "bias": False}),  # packed, or in integers
    ],
    ids=str,
)
def test_every_route_returns_what_torch_does(shape, options, name):
    model = layer(SCHEMES[name], *shape, **options)
    fast, packed = set_memory(copy.deepcopy(model), "fast"), model[0].packed("weight")
    for n in (1, 2, 5, 16, 2):
        images = torch.randn(n, shape[0], 8, 8)
        for x in (images, images.relu(), images.contiguous(memory_format=torch.channels_last)):
            expected = model[0]._conv_forward(packed.quantize_input(x), packed.decode(), model[0].bias)
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


@integers
@pytest.mark.usefixtures("_small_pays")
@torch.no_grad()
def test_a_kernel_for_inputs_without_negative_ones_is_not_used_for_others():
    model, images = layer(SCHEMES["dynamic"], 8, 6, 3, padding=1), torch.randn(4, 8, 6, 6)
    packed = model[0].packed("weight")
    for x in (images.relu(), images, images.relu()):
        expected = F.conv2d(packed.quantize_input(x), packed.decode(), model[0].bias, padding=1)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [any(kernel.border) for kernel in kernels(packed)] == [False, True]


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_routes_do_not_keep_a_packed_weight_alive(name):
    model = set_memory(layer(SCHEMES[name], 64, 64, 3, padding=1), "fast")
    for n in (1, 8):
        model(torch.randn(n, 64, 8, 8))
    packed = weakref.ref(model[0].packed("weight"))
    gc.disable()
    try:
        del model
        assert packed() is None
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_a_network_whose_norms_torch_has_folded(memory, tmp_path):
    """Symmetric scales of a channel take the factor of its norm and leave the codes as they are."""
    torch.manual_seed(0)
    plain, x = DigitsClassifier(width=8).eval(), torch.randn(16, 1, 8, 8)
    for norm in (module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)):
        for values, low, high in [(norm.weight, 0.5, 2), (norm.running_var, 0.5, 2), (norm.bias, -0.3, 0.3)]:
            values.uniform_(low, high)
    scheme = Int(8, symmetric=True, activation=Int(8, mode="static"))
    folded = quantize(fuse(plain), scheme, [x])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    save(folded, tmp_path / "folded.safetensors")
    found = set_memory(folded, memory)(x)
    expected, error = quantize(copy.deepcopy(plain), scheme, [x])(x), (found - plain(x)).norm() / plain(x).norm()
    assert (found - expected).norm() < 0.005 * expected.norm() and error < 0.03
    loaded = set_memory(load(fuse(plain), tmp_path / "folded.safetensors"), memory)
    assert torch.equal(loaded(x), found)


@torch.no_grad()
@integers
@pytest.mark.usefixtures("_small_pays")
@pytest.mark.parametrize("name", ["dynamic", "static", "per tensor"])
def test_a_pruned_channel_is_its_bias(name):
    scheme = SCHEMES.get(name, Int(8, activation=Int(8, per="tensor")))
    model = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1))
    model[0].weight[2:4] = 0
    x = 100 * torch.randn(4, 16, 6, 6)
    model = quantize(model, scheme, [x])
    assert torch.equal(model(x)[:, 2:4], model[0].bias[2:4, None, None].expand(4, 2, 6, 6))


@torch.no_grad()
@integers
@pytest.mark.usefixtures("_small_pays")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_padding_that_is_changed_counts():
    model, x = layer(SCHEMES["static"], 8, 6, (3, 2), padding=1), torch.randn(4, 8, 6, 6)
    packed = model[0].packed("weight")
    for padding in ((1, 1), (2, 0), "valid", "same", 1):
        model[0].padding = padding
        expected = F.conv2d(packed.quantize_input(x), packed.decode(), model[0].bias, padding=padding)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("args", "size"), [((64, 64, 3), 4), ((1, 32, 3), 8), ((32, 48, 1, 2), 8)], ids=["packed", "unfolded", "pixelwise"]
)
def test_what_torch_refuses_is_refused_as_by_torch(args, size):
    plain = nn.Conv2d(*args)
    model, x = set_memory(layer(Int(8), *args), "fast"), torch.randn(4, args[0], size, size)
    model(x)
    for bad in (x.bfloat16(), x.double(), torch.randn(4, args[0] + 1, size, size), x[:, :, :0]):
        with pytest.raises(RuntimeError) as expected:
            plain(bad)
        with pytest.raises(RuntimeError) as found:
            model(bad)
        assert str(found.value) == str(expected.value)
    torch.testing.assert_close(
        model(x), F.conv2d(x, model[0].weight, model[0].bias, model[0].stride), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_lean_memory_keeps_no_float_weight():
    model = layer(Int(8), 32, 32, 3, padding=1)
    packed = model[0].packed("weight")
    for n in (1, 2, 16):
        model(torch.randn(n, 32, 8, 8))
    assert not any(isinstance(value, (Route, torch.Tensor)) for value in packed._made.values())


@integers
@torch.no_grad()
@pytest.mark.parametrize(("images", "most_passes"), [(2, -1), (4, 0), (5, 0), (6, 1), (24, 1), (25, 2)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("is_unsigned", [False, True])
def test_zero_points_and_borders_must_pay(images, most_passes, symmetric, is_unsigned):
    """Each adds a pass over the numbers, which more products must outweigh."""
    model, x = (
        layer(Int(8, symmetric=symmetric, activation=Int(8)), 32, 32, 3, padding=1),
        torch.randn(images, 32, 8, 8),
    )
    model(x.relu() if is_unsigned else x)
    assert runs_in_integers(model[0].packed("weight")) == (2 - symmetric - is_unsigned <= most_passes)


@integers
@torch.no_grad()
def test_kernels_of_few_products_for_each_number_never_pay():
    model = layer(Int(8, symmetric=True, activation=Int(8)), 32, 64, 1)
    model(torch.rand(64, 32, 12, 12))
    assert not runs_in_integers(model[0].packed("weight"))
