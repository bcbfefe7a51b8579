"""Trained codebooks: gradients against a dense twin whose gradient is summed by hand, values against what is stored."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Attention, Recurrent, TiedByName, TiedByRead
from torch import nn
from torch.optim import SGD, AdamW

from lightning_qnoise import PQ, Int, dequantize, quantize, set_memory, train_codebooks
from lightning_qnoise.layers import packed_weights

INTEGERS = {"codebook": Int(8, "tensor")}
SCHEMES = [
    PQ(4, 6, "float32"),
    PQ(4, 8, "float16"),
    PQ(2, 60, "bfloat16"),
    PQ(4, 7, **INTEGERS),
    PQ(4, 6, codebook=Int(4, "channel", symmetric=True)),
]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def conv():
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU(), nn.ConvTranspose2d(12, 4, 2, bias=False))


LAYERS = {
    "linear": (lambda: nn.Linear(20, 33), lambda: torch.randn(5, 3, 20)),
    "one vector": (lambda: nn.Linear(20, 33), lambda: torch.randn(20)),
    "strided": (lambda: nn.Linear(20, 33, bias=False), lambda: torch.randn(20, 7).t()),
    "no rows": (lambda: nn.Linear(20, 33), lambda: torch.randn(0, 20)),
    "conv": (conv, lambda: torch.randn(2, 8, 5, 5)),
    "embedding": (lambda: nn.Embedding(30, 16, padding_idx=3), lambda: torch.tensor([[3, 1, 3], [29, 1, 3]])),
    "by frequency": (lambda: nn.Embedding(30, 16, scale_grad_by_freq=True), lambda: torch.tensor([7, 1, 7, 7])),
    "bag": (lambda: nn.EmbeddingBag(30, 16, padding_idx=3), lambda: torch.tensor([[3, 1, 3], [29, 1, 3]])),
    "tied": (TiedByName, lambda: torch.randint(20, (2, 5))),
    "tied by read": (TiedByRead, lambda: torch.randint(20, (2, 5))),
    "attention": (Attention, lambda: torch.randn(2, 5, 16)),
    "kdim": (lambda: Attention(kdim=8), lambda: torch.randn(2, 5, 16)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(2, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(2, 5, 8)),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def packed_model(make, scheme, zeros=0):
    """A packed model whose weights hold some blocks of zeros, and a dense twin of it."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[:zeros] = 0
    quantize(model, scheme)
    return model, dequantize(copy.deepcopy(model))


def loss_of(y):
    y = y.float()
    return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + y.square().sum()


def blocks_summed(dense, packed, average=False):
    """The codebook's gradient from that of the decoded weight, in float64."""
    codes, blocks = packed.indices().flatten().numpy(), dense.double().reshape(-1, packed.scheme.block_size).numpy()
    sums = np.zeros((packed.scheme.n_centroids, packed.scheme.block_size))
    np.add.at(sums, codes, blocks)
    sums[~packed.codewords().detach().numpy().any(axis=1)] = 0
    if average:
        sums /= np.bincount(codes, minlength=len(sums)).clip(1)[:, None]
    return sums


def check_gradients(model, twin, average=False, rtol=1e-4, atol=1e-5):
    """Every gradient of the packed model against the twin's, which has been summed by hand."""
    found = set()
    for name, packed in packed_weights(model):
        dense = twin.get_parameter(name).grad
        expected = blocks_summed(dense, packed, average)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(packed.codebook.grad.numpy(), expected, rtol=rtol, atol=atol * scale)
        found.add(packed)
    own = {id(packed.codebook) for packed in found}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, rtol=rtol, atol=atol * 10)
    assert len(own) == len({id(p) for p in twin.parameters() if p.ndim > 1})


@each_scheme
@each_layer
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_gradients_are_those_of_the_dense_weight(layer, scheme, memory):
    make, data = LAYERS[layer]
    model, twin = packed_model(make, scheme, zeros=2)
    set_memory(train_codebooks(model), memory)
    x = data()
    y, expected = model(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    loss_of(y).backward()
    loss_of(expected).backward()
    check_gradients(model, twin)


@each_layer
def test_the_mean_over_the_blocks(layer):
    make, data = LAYERS[layer]
    model, twin = packed_model(make, PQ(4, 6), zeros=1)
    train_codebooks(model, average=True)
    x = data()
    loss_of(model(x)).backward()
    loss_of(twin(x)).backward()
    if "tied" in layer:  # the twin's gradient is that of both uses
        assert all(packed.codebook.grad is not None for _, packed in packed_weights(model))
    check_gradients(model, twin, average=True)


@pytest.mark.parametrize("layer", ["linear", "conv", "embedding", "tied", "attention", "lstm"])
def test_gradients_under_autocast(layer):
    make, data = LAYERS[layer]
    x = data()
    if layer == "lstm":
        try:
            with torch.autocast("cpu", torch.bfloat16):
                make()(x)
        except RuntimeError as error:
            pytest.skip(f"torch has no LSTM in bfloat16 on this processor: {error}")
    model, twin = packed_model(make, PQ(4, 6))
    train_codebooks(model)
    for net in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        loss_of(y).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    check_gradients(model, twin, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 9), lambda: nn.Conv2d(8, 6, 3)])
@pytest.mark.parametrize("activation", [Int(8), Int(8, per="tensor")], ids=str)
def test_gradients_behind_a_quantized_input(make, activation):
    model, twin = packed_model(make, PQ(4, 6, activation=activation))
    train_codebooks(model)
    x = torch.randn(7, 24) if isinstance(model, nn.Linear) else torch.randn(2, 8, 5, 5)
    loss_of(model(x)).backward()
    rounded = model.packed("weight").quantize_input(x)
    assert not torch.equal(rounded, x)
    loss_of(twin(rounded)).backward()
    check_gradients(model, twin)


@pytest.mark.parametrize("layer", ["linear", "embedding", "conv"])
def test_finite_differences(layer):
    make, data = LAYERS[layer]
    model = train_codebooks(quantize(make()[:1] if layer == "conv" else make(), PQ(4, 6, "float32"))).double()
    x = data()
    x = x.double() if x.is_floating_point() else x + x.eq(3)  # its padding row counts in the loss only

    def loss():
        y = model(x)
        return (y * torch.linspace(-1, 1, y.numel()).double().view(y.shape)).sum() + y.square().sum()

    loss().backward()
    for codebook in [packed.codebook for _, packed in packed_weights(model)]:
        assert codebook.dtype == torch.float32
        for place in [(1, 0), (2, 1), (5, 3)]:  # codeword 0 is that of the padding row
            ends, losses, kept = [], [], codebook[place].item()
            for step in (-0.125, 0.125):
                with torch.no_grad():
                    codebook[place] = kept + step
                    ends.append(codebook[place].item())
                    losses.append(loss().item())
                    codebook[place] = kept
            slope = (losses[1] - losses[0]) / (ends[1] - ends[0])  # of a quadratic function: exact
            np.testing.assert_allclose(codebook.grad[place].item(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_not_rounded_and_do_not_overflow(dtype):
    model = train_codebooks(quantize(nn.Linear(32, 64, bias=False), PQ(4, 3, "float16"))).to(dtype)
    packed = model.packed("weight")
    assert packed.codebook.dtype == torch.float32 and model.weight.dtype == dtype
    x = torch.randint(-8, 9, (4, 32)).to(dtype)
    model(x).backward(gradient := torch.randint(-100, 101, (4, 64)).to(dtype))
    exact = blocks_summed(gradient.double().t() @ x.double(), packed)
    np.testing.assert_allclose(packed.codebook.grad.numpy(), exact, rtol=1e-6)
    model.zero_grad()
    model(x * 100).backward(gradient * 100)
    np.testing.assert_allclose(packed.codebook.grad.numpy(), exact * 1e4, rtol=2e-2, atol=2e5)
    assert packed.codebook.grad.abs().max() > torch.finfo(torch.float16).max


@each_scheme
def test_a_step_of_sgd_by_hand(scheme):
    model = train_codebooks(quantize(nn.Linear(20, 33), scheme))
    packed, x, target = model.packed("weight"), torch.randn(6, 20), torch.randn(6, 33)
    before, bias = packed.codebook.detach().double().numpy(), model.bias.detach().double().numpy()
    weight = packed.decode().detach().double().numpy()
    optimizer = SGD(model.parameters(), lr=0.125)
    F.mse_loss(model(x), target, reduction="sum").backward()
    optimizer.step()
    residual = 2 * (x.double().numpy() @ weight.T + bias - target.double().numpy())
    update = blocks_summed(torch.from_numpy(residual.T @ x.double().numpy()), packed)
    np.testing.assert_allclose(packed.codebook.detach().numpy(), before - 0.125 * update, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.bias.detach().numpy(), bias - 0.125 * residual.sum(0), rtol=1e-4, atol=1e-4)


@each_scheme
@pytest.mark.parametrize("average", [False, True])
def test_codewords_of_zeros_stay_zero(scheme, average):
    model, _ = packed_model(lambda: nn.Sequential(nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 20)), scheme, 1)
    train_codebooks(model, average=average)
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    zeros = [~packed.codebook.any(dim=1) for _, packed in packed_weights(model)]
    assert all(zero.any() for zero in zeros)
    for _ in range(5):
        loss_of(model(torch.randint(20, (4, 4)))).backward()
        optimizer.step()
    for zero, (_, packed) in zip(zeros, packed_weights(model), strict=True):
        assert not packed.codebook[zero].any() and not packed.codebook.grad[zero].any()
        assert (packed.codebook[~zero] != 0).any()
        assert not packed.decode()[0].any()


def test_a_padding_row_passes_no_gradient_on():
    model = train_codebooks(quantize(nn.Embedding(12, 8, padding_idx=5), PQ(4, 4)))
    assert model.packed("weight").codewords()[model.packed("weight").indices()[0].long()].any()
    with torch.no_grad():  # a padding row that is not zero
        codes = model.packed("weight").indices().long()
        codes[5] = codes[0]
        model.packed("weight").write_codes(codes)
    for memory in ("lean", "fast"):
        set_memory(model, memory).zero_grad()
        assert model(torch.tensor([5, 5])).any()
        model(torch.tensor([5, 5])).sum().backward()
        assert not model.packed("weight").codebook.grad.any()
        model(torch.tensor([0, 5])).sum().backward()
        assert model.packed("weight").codebook.grad.sum() == 8


def steps(model, n=3, lr=0.03):
    """Train on noise."""
    optimizer = AdamW(model.parameters(), lr=lr)
    for _ in range(n):
        optimizer.zero_grad()
        loss_of(model(torch.randn(9, 16))).backward()
        optimizer.step()
    return model


def net(scheme, dtype=torch.float32):
    return quantize(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20)).to(dtype), scheme)


@each_scheme
@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_is_that_of_the_frozen_model(scheme, memory, dtype):
    model = set_memory(steps(train_codebooks(net(scheme))), memory).to(dtype)
    x = torch.randn(5, 16, dtype=dtype)
    with torch.no_grad():
        trained, weight = model(x), model[0].weight
        codewords = model[0].packed("weight").codewords()
        assert train_codebooks(model, False) is model
        assert torch.equal(model(x), trained) and torch.equal(model[0].weight, weight)
        assert torch.equal(model[0].packed("weight").codewords(), codewords)
    assert sorted(name for name, _ in model.named_parameters()) == ["0.bias", "2.bias"]
    packed = model[0].packed("weight")
    assert scheme.codebook or packed.codebook.dtype == getattr(torch, scheme.codebook_dtype)


def test_a_convolution_of_few_positions_is_that_of_the_frozen_model():
    model = set_memory(train_codebooks(quantize(nn.Conv2d(16, 24, 3), PQ(4, 8))), "fast")
    x = torch.randn(1, 16, 6, 6)
    for _ in range(2):
        with torch.no_grad():
            model.packed("weight").codebook.add_(torch.rand_like(model.packed("weight").codebook))
            expected = set_memory(train_codebooks(copy.deepcopy(model), False), "fast")(x)
            assert torch.equal(model(x), expected)


def test_a_product_is_that_of_the_rounded_weight():
    packed = train_codebooks(quantize(nn.Linear(32, 24), PQ(4, 8, "float32"))).to(torch.bfloat16).packed("weight")
    x = torch.randn(5, 32)
    weight = packed.decode()
    assert weight.dtype == torch.bfloat16 and not torch.isin(weight.float(), packed.codewords()).any()
    torch.testing.assert_close(packed.linear(x), x @ weight.float().t(), rtol=1e-5, atol=1e-5)


def test_what_is_read_is_rounded():
    model = train_codebooks(net(PQ(4, 8)))
    codebook = model[0].packed("weight").codebook
    with torch.no_grad():
        codebook.add_(torch.rand_like(codebook) * 1e-3)
    read = model[0].packed("weight").codewords()
    assert torch.equal(read, codebook.half().float()) and not torch.equal(read, codebook)
    assert torch.isin(model[0].weight, codebook.half().float()).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_on_and_off_are_idempotent(dtype):
    model = net(PQ(4, 8, dtype))
    earlier, start = model.state_dict(), copy.deepcopy(model.state_dict())
    train_codebooks(model, False)
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    codebook = train_codebooks(model)[0].packed("weight").codebook
    assert train_codebooks(model.requires_grad_(False))[0].packed("weight").codebook is codebook
    assert codebook.requires_grad and not model[0].bias.requires_grad
    assert train_codebooks(model, average=True)[0].packed("weight").average
    train_codebooks(train_codebooks(model, False), False)
    state = model.state_dict()
    assert list(state) == list(start) and all(torch.equal(state[key], start[key]) for key in start)
    assert not model[0].packed("weight").average
    with torch.no_grad():
        codebook.zero_()  # nobody's any more, and never was that of before
    assert model[0].weight.any() and torch.equal(earlier["0.weight.codebook"], start["0.weight.codebook"])


def test_tied_weights_have_one_codebook():
    model = train_codebooks(quantize(TiedByName(), PQ(4, 8)))
    assert [name for name, _ in model.named_parameters()] == ["embed.weight.codebook"]
    assert model.out.packed("weight").codebook is model.embed.packed("weight").codebook


@pytest.mark.parametrize("model", [nn.Linear(8, 8), quantize(nn.Linear(8, 8), "int8")], ids=["float", "int8"])
def test_a_model_without_codebooks_is_refused(model):
    with pytest.raises(ValueError, match=r"no weight of the model has a codebook.*PQ"):
        train_codebooks(model)


def test_codebooks_without_gradients():
    model = train_codebooks(net(PQ(4, 8))).requires_grad_(False)
    assert not model(torch.randn(3, 16)).requires_grad
    assert not model[0].weight.requires_grad


@each_scheme
def test_nothing_stale_is_read(scheme):
    model, x = set_memory(train_codebooks(net(scheme)), "fast").eval(), torch.randn(5, 16)

    def check():
        fresh = copy.deepcopy(model)
        dense = dequantize(copy.deepcopy(fresh))
        with torch.no_grad():
            y = model(x)
            assert torch.equal(y, fresh(x)) and torch.equal(y, dense(x))
        return y

    seen = [check()]
    optimizer = SGD(model.parameters(), lr=0.01)
    loss_of(model(x)).backward()
    optimizer.step()
    seen.append(check())
    packed = model[0].packed("weight")
    packed.codebook.data.mul_(-1)  # as no version counter tells
    seen.append(check())
    packed.write_codebook(torch.randn_like(packed.codebook))
    seen.append(check())
    packed.write_codes(packed.indices().flip(0).contiguous())
    seen.append(check())
    model.load_state_dict(train_codebooks(net(scheme)).state_dict())
    seen.append(check())
    train_codebooks(model, False)
    assert torch.equal(check(), seen[-1])
    train_codebooks(model)
    model[0].packed("weight").codebook.data.mul_(-1)
    seen.append(check())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_their_own(again):
    model = steps(train_codebooks(net(PQ(4, 8)), average=True))
    other, before = again(model), copy.deepcopy(model.state_dict())
    assert other[0].packed("weight").average and other[0].packed("weight").codebook.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    steps(other)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(other[0].packed("weight").codebook, model[0].packed("weight").codebook)


def test_codes_are_not_copied_and_not_stale():
    bytes_ = quantize(nn.Linear(64, 64), PQ(2, 256)).packed("weight")
    assert bytes_.indices().data_ptr() == bytes_.codes.data_ptr() and bytes_.indices().shape == (64, 32)
    for k, dtype in ((5, torch.uint8), (300, torch.int16), (40000, torch.int32)):
        packed = PQ(2, k).empty((200, 402))
        codes = torch.randint(k, (200, 201))
        packed.write_codes(codes)
        assert packed.indices().dtype == dtype and torch.equal(packed.indices().long(), codes)
        assert packed.indices().data_ptr() == packed.indices().data_ptr() == packed._made["codes"].data_ptr()
        packed.write_codes(codes.flip(0))
        assert torch.equal(packed.indices().long(), codes.flip(0))
        other = PQ(2, k).empty((200, 402))
        other.write_codes(codes)
        packed.load_state_dict(other.state_dict())
        assert torch.equal(packed.indices().long(), codes)
        packed.to(torch.float64)
        assert not packed._made


@pytest.mark.parametrize("k", [12, 256, 300])
def test_following_a_weight_leaves_what_others_hold(k):
    weight = torch.randn(64, 32)
    packed = PQ(2, k).encode(weight)
    held = packed.indices()
    before = held.clone()
    packed.follow(torch.zeros_like(weight), torch.zeros(64, 16, dtype=torch.bool))
    assert torch.equal(packed.indices(), before)
    kept = copy.deepcopy(packed)
    packed.follow(weight.flip(0), torch.ones(64, 16, dtype=torch.bool))
    assert not torch.equal(packed.indices(), before) and torch.equal(kept.indices(), before)
    if k != 256:
        assert torch.equal(held, before)


@pytest.mark.parametrize("scheme", [PQ(4, 5), PQ(2, 160)], ids=str)
def test_training_after_validation_in_inference_mode(scheme):
    model = train_codebooks(quantize(nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 20)), scheme))
    with torch.inference_mode():
        model(torch.arange(4))
    loss_of(model(torch.arange(4))).backward()
    assert model[0].packed("weight").codebook.grad.any()


@pytest.mark.parametrize("scheme", [PQ(4, 6), PQ(4, 6, **INTEGERS)], ids=str)
def test_compiled(scheme):
    model = train_codebooks(quantize(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Conv1d(5, 8, 4)), scheme))
    x = torch.randn(2, 5, 16)
    loss_of(model(x)).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    loss_of(y).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)
