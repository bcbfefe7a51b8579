"""Packed models that are trained: what they learn, fits that resume, files, checkpoints, the rest of the package."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fits import PQS, checkpoint, equal, fit, losses, net, rows, trainer
from models import Attention, TiedByName
from torch import nn

from lightning_qnoise import (
    PQ,
    Int,
    Quantize,
    QuantNoise,
    dequantize,
    load,
    quantize,
    save,
    size_table,
    train_codebooks,
)
from lightning_qnoise.convert import dense_state_dict
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import resolve
from lightning_qnoise.size import nbytes
from lightning_qnoise.weights import list_weights, owners

SCHEMES = [
    PQ(4, 8),
    PQ(4, 8, "bfloat16"),
    PQ(4, 8, codebook=Int(8, "tensor")),
    PQ(4, 8, codebook=Int(4, symmetric=True)),
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning", "ignore:.*exists and is not empty:UserWarning"
)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def steps(model, n=3, lr=0.03):
    """Train all that can be trained on `rows(256)`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(n):
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :4].argmax(dim=1)).backward()
        optimizer.step()
    return model


def content(path):
    """Header and tensors of a file; safetensors writes its metadata in any order."""
    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def plain():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 4))


def trained(scheme, seed=0):
    torch.manual_seed(seed)
    return steps(train_codebooks(quantize(plain(), scheme)))


@each_scheme
def test_it_learns(scheme):
    model = train_codebooks(quantize(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), scheme))
    codes = [packed.codes.clone() for _, packed in packed_weights(model)]
    before, _ = losses(model, rows(256))
    steps(model, n=150)
    after, accuracy = losses(train_codebooks(model, False), rows(256))
    assert after < before / 3 and accuracy > 0.8
    assert all(torch.equal(a, packed.codes) for a, (_, packed) in zip(codes, packed_weights(model), strict=True))


@pytest.mark.parametrize("policy", [PQS, {"*": PQ(8, 8, codebook=Int(8, "tensor"))}], ids=["float16", "int8"])
def test_a_fit_of_a_loaded_model_resumes_bit_equally(policy):
    save(quantize(net(), policy), "small.safetensors")

    def loaded():
        return train_codebooks(load(net(seed=1), "small.safetensors"))

    whole, half, resumed = loaded(), loaded(), loaded()
    start = copy.deepcopy(whole.state_dict())
    made = fit(whole, max_epochs=4)
    fit(half, [checkpoint()], max_epochs=2)
    (path,) = Path("ckpt").glob("epoch=1*")
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert stored["fc.weight.codebook"].dtype == torch.float32 and "fc.bias" in stored
    again = fit(resumed, ckpt_path=path, max_epochs=4)
    assert equal(whole, resumed) and not equal(whole, half) and not equal(whole, start)
    assert again.callback_metrics["val_loss"] == made.callback_metrics["val_loss"]
    frozen = train_codebooks(copy.deepcopy(whole), False)
    assert losses(frozen, rows(32)) == losses(whole, rows(32))
    save(whole, "tuned.safetensors")
    assert losses(load(net(seed=2), "tuned.safetensors"), rows(32)) == losses(whole, rows(32))


def test_a_callback_that_is_switched_off_leaves_checkpoints_alone():
    def made():
        return train_codebooks(quantize(net(), PQS))

    off = [QuantNoise(PQS, rate=0.5, enabled=False), Quantize(enabled=False)]
    whole, resumed = made(), made()
    fit(whole, [*off, checkpoint()], max_epochs=2)
    (path,) = Path("ckpt").glob("epoch=0*")
    fit(resumed, off, ckpt_path=path, max_epochs=2)
    assert equal(whole, resumed)


@pytest.mark.parametrize("callback", [QuantNoise(PQS), Quantize(PQS)], ids=lambda callback: type(callback).__name__)
def test_noise_and_packing_are_refused(callback):
    with pytest.raises(ValueError, match=r"already packed.*dequantize"):
        fit(train_codebooks(quantize(net(), PQS)), [callback])


@each_scheme
def test_a_file_is_that_of_the_frozen_model(scheme):
    model = trained(scheme)
    frozen = train_codebooks(copy.deepcopy(model), False)
    assert save(model, "a.safetensors") == save(frozen, "b.safetensors") == nbytes(model) == nbytes(frozen)
    assert content("a.safetensors") == content("b.safetensors")
    assert size_table(model) == size_table(frozen)
    assert model[0].packed("weight").codebook.dtype == torch.float32  # still trained
    x = torch.randn(5, 16)
    read = load(plain(), "a.safetensors").eval()
    assert torch.equal(read(x), model.eval()(x))
    assert list(read.state_dict()) == list(frozen.state_dict()) and equal(read, frozen)


def test_tied_codebooks_are_stored_once():
    model = train_codebooks(quantize(TiedByName(), PQ(4, 8)))
    frozen = train_codebooks(copy.deepcopy(model), False)
    assert save(model, "a.safetensors") == save(frozen, "b.safetensors") == nbytes(model)
    assert content("a.safetensors") == content("b.safetensors")
    assert nbytes(model.embed.packed("weight")) == nbytes(frozen.embed.packed("weight")) == 80 * 3 // 8 + 8 * 4 * 2


@each_scheme
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_into_either_form(scheme, assign):
    model, x = trained(scheme), torch.randn(5, 16)
    expected = model.eval()(x)
    frozen = train_codebooks(copy.deepcopy(model), False)
    other = quantize(plain(), scheme).eval()
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(other(x), expected) and not other[0].packed("weight").is_trained
    assert equal(other, frozen)
    other = train_codebooks(quantize(plain(), scheme)).eval()
    other.load_state_dict(frozen.state_dict(), assign=assign)
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)  # integers are fitted anew
    assert scheme.codebook or torch.equal(other(x), expected)
    assert other[0].packed("weight").codebook.dtype == torch.float32
    other.load_state_dict(model.state_dict(), assign=assign)
    assert equal(other, model) and torch.equal(other(x), expected)
    steps(other)


def test_a_float_state_dict_is_encoded():
    model, source = train_codebooks(quantize(plain(), PQ(4, 8))), plain()
    source[0].weight.data = source[0].weight.data.view(-1, 4)[:8].repeat(16, 1).view(32, 16)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model[0].weight, source[0].weight, rtol=1e-3, atol=1e-3)
    assert [name for name, _ in model.named_parameters() if "codebook" in name]


@pytest.mark.parametrize("integers", [None, Int(8, "tensor")])
@pytest.mark.parametrize("is_trained", [False, True])
def test_what_does_not_fit_is_an_error(integers, is_trained):
    model = train_codebooks(quantize(nn.Linear(16, 32), PQ(4, 8, codebook=integers)), is_trained)
    other = train_codebooks(quantize(nn.Linear(16, 32), PQ(4, 9, codebook=integers)))
    for source in (other.state_dict(), train_codebooks(other, False).state_dict()):
        with pytest.raises(RuntimeError, match=r"size mismatch for (weight\.)?co"):
            model.load_state_dict(source)
    with pytest.raises(RuntimeError, match=r"Missing key.*codebook"):
        model.load_state_dict({key: value for key, value in model.state_dict().items() if "codebook" not in key})


@each_scheme
def test_the_rest_of_the_package(scheme):
    model, x = trained(scheme).eval(), torch.randn(5, 16)
    y = model(x).detach()
    assert resolve(nn.Sequential(model, nn.Linear(16, 32)), "int8").keys() == {"1.weight"}
    assert not any("codebook" in name for name, *_ in owners(model))
    assert not any("codebook" in weight.name for weight in list_weights(model))
    with pytest.raises(ValueError, match="selects no weight"):
        quantize(model, "int8")
    state = dense_state_dict(model)
    assert list(state) == list(plain().state_dict()) and not any(value.requires_grad for value in state.values())
    twin = plain().eval()
    twin.load_state_dict(state)
    torch.testing.assert_close(twin(x), y, rtol=1e-5, atol=1e-5)
    dense = dequantize(copy.deepcopy(model))
    assert equal(dense, state) and all(p.is_leaf and p.requires_grad for p in dense.parameters())
    loss = dense(x).sum()
    loss.backward()
    assert dense[0].weight.grad is not None


def test_onnx():
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from lightning_qnoise import export_onnx

    for scheme in (PQ(8, 16), PQ(8, 16, codebook=Int(8, "tensor"))):
        model = nn.Sequential(nn.Embedding(40, 16, padding_idx=1), nn.Linear(16, 64))
        model = train_codebooks(quantize(model, scheme))
        with torch.no_grad():
            for _, packed in packed_weights(model):
                packed.codebook.add_(torch.rand_like(packed.codebook) * 1e-3)
        ids = torch.randint(40, (3, 5))
        sizes = [export_onnx(model, (ids,), "a.onnx")]
        y = model(ids).detach()
        sizes.append(export_onnx(train_codebooks(copy.deepcopy(model), False), (ids,), "b.onnx"))
        assert sizes[0] == sizes[1] and model[1].packed("weight").is_trained
        onnx.checker.check_model("a.onnx")
        (found,) = runtime.InferenceSession("a.onnx").run(None, {"input": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=1e-4)


def test_data_parallel():
    model = train_codebooks(quantize(nn.Sequential(Attention(), nn.Linear(16, 8)), PQ(4, 8)))
    x = torch.randn(2, 5, 16)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    dist.init_process_group("gloo", store=dist.FileStore("store", 1), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x).square().sum().backward()
        assert save(parallel, "a.safetensors") == nbytes(train_codebooks(copy.deepcopy(model), False))
    finally:
        dist.destroy_process_group()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_moving_a_model_moves_its_codebooks():
    model = train_codebooks(quantize(nn.Linear(16, 32), PQ(4, 8)))
    codebook = model.packed("weight").codebook
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model.to(dtype)
        assert model.packed("weight").codebook is codebook and codebook.dtype == torch.float32
        model(torch.randn(3, 16, dtype=dtype)).sum().backward()
    assert codebook.grad.dtype == torch.float32
    moved = copy.deepcopy(model).to("meta").packed("weight").codebook
    assert moved.is_meta and isinstance(moved, nn.Parameter) and moved.dtype == torch.float32


def test_testing_a_checkpoint():
    model = train_codebooks(quantize(net(), PQS))
    fit(model, [checkpoint()], max_epochs=1)
    (path,) = Path("ckpt").glob("*")
    expected = losses(model, rows(32))[0]
    for target in (train_codebooks(quantize(net(seed=1), PQS)), quantize(net(seed=1), PQS)):
        (metrics,) = trainer().test(target, ckpt_path=path, verbose=False)
        assert metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
