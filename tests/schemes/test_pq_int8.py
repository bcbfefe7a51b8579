"""PQ whose codebook is stored as integers, and what is built on top of it."""

import json

import numpy as np
import pytest
import torch
from models import TiedByName
from references import int_reference, pq_reference, squared_distances
from torch import nn

from lightning_qnoise import PQ, Int, load, quantize, save, size_table
from lightning_qnoise.latent import LatentWeight
from lightning_qnoise.noise import WeightNoise
from lightning_qnoise.policy import from_json, to_json
from lightning_qnoise.schemes import IntWeight, Scheme
from lightning_qnoise.size import nbytes
from lightning_qnoise.tied import TiedWeight

CODEBOOKS = [Int(8, "tensor"), Int(8, "channel", symmetric=True), Int(6, "group:2"), Int(4, "tensor", range="mse")]
each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS, ids=str)


def levels(packed):
    """The codebook of an encoding, decoded in NumPy from its stored integers."""
    stored = packed.codebook
    k, size, bits = packed.scheme.n_centroids, packed.scheme.block_size, stored.scheme.bits
    number = int.from_bytes(stored.codes.numpy().tobytes(), "little")
    codes = np.array([(number >> (bits * i)) & (2**bits - 1) for i in range(k * size)], np.float32)
    scale = stored.scale.numpy()
    zero = np.full_like(scale, 2 ** (bits - 1)) if stored.zero_point is None else stored.zero_point.numpy()
    groups = codes.reshape(*scale.shape, -1)
    return ((groups - zero.astype(np.float32)[..., None]) * scale[..., None]).reshape(k, size)


@each_codebook
@pytest.mark.parametrize("shape, size", [((33, 24), 8), ((16, 4, 3, 3), 18), ((30, 10, 1, 1), 2)])
def test_decode_looks_up_integer_codewords(codebook, shape, size):
    weight = torch.randn(shape)
    packed = PQ(size, 7, codebook=codebook).encode(weight)
    codewords = levels(packed)
    np.testing.assert_array_equal(packed.codewords(), codewords)
    np.testing.assert_array_equal(packed.decode(), pq_reference(packed.indices().numpy(), codewords, shape))
    distances = squared_distances(weight.view(-1, size).numpy(), codewords)
    chosen = distances[np.arange(len(distances)), packed.indices().flatten().numpy()]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-5, atol=1e-6)  # of the rounded codewords


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_codebook_is_the_float_one_rounded(granularity, symmetric):
    weight = torch.randn(64, 32)
    plain = PQ(4, 16, "float32").encode(weight).codebook.numpy()
    packed = PQ(4, 16, codebook=Int(8, granularity, symmetric)).encode(weight)
    np.testing.assert_array_equal(packed.codewords(), int_reference(plain, 8, granularity, symmetric)[3])
    error = (packed.decode() - weight).square().mean()
    assert error < 1.01 * (PQ(4, 16, "float32").encode(weight).decode() - weight).square().mean()


class Net(nn.Module):
    """A table, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 24, 3)
        self.head = nn.Linear(24, 50)

    def forward(self, ids):
        return self.head(self.conv(self.embed(ids).mT).mT)


IDS = torch.arange(60).view(5, 12)


@each_codebook
def test_predicted_bytes_are_those_of_the_file(codebook, tmp_path):
    policy = {"embed": PQ(4, 20, codebook=codebook), "conv": PQ(6, 33, codebook=codebook), "head": PQ(8, 16)}
    model = Net()
    predicted = size_table(model, policy)
    quantize(model, policy)
    assert predicted.bytes == save(model, tmp_path / "m.safetensors") == size_table(model).bytes == nbytes(model)
    by_name = {entry.name: entry.bytes for entry in predicted.entries}
    scales = {"tensor": 1, "channel": 20, "group:2": 40}[codebook.granularity]
    codes = 60 * 16 // 4 * 5 // 8  # five bits a code
    assert by_name["embed.weight"] == codes + 20 * 4 * codebook.bits // 8 + scales * (4 if codebook.symmetric else 5)
    assert {entry.name: entry.bytes for entry in size_table(model).entries} == by_name
    again = load(Net(), tmp_path / "m.safetensors")
    assert torch.equal(again(IDS), model(IDS))
    assert again.embed.packed("weight").scheme == policy["embed"]
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_damaged_nested_codebook_is_noticed(tmp_path):
    model = quantize(nn.Sequential(nn.Linear(32, 32)), {"*": PQ(4, 16, codebook=CODEBOOKS[0])})
    del model._modules["0"].packed("weight")._modules["codebook"]._buffers["scale"]
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"0\.weight\.codebook\.scale does not fit"):
        load(nn.Sequential(nn.Linear(32, 32)), tmp_path / "m.safetensors")


@each_codebook
def test_blocks_of_zeros_stay_exactly_zero(codebook):
    weight = torch.randn(64, 32) + 0.2
    zero = torch.rand(64, 8) < 0.2
    weight.view(64, 8, 4)[zero] = 0
    packed = PQ(4, 16, codebook=codebook).encode(weight)
    assert (packed.decode().view(64, 8, 4)[zero] == 0).all()
    assert not PQ(4, 16, codebook=codebook).encode(torch.zeros(8, 8)).decode().any()
    model = quantize(Net(), {"embed": PQ(4, 20, codebook=codebook)})
    assert not model.embed(torch.zeros(3, dtype=torch.long)).any()


@each_codebook
def test_from_json(codebook):
    scheme = PQ(8, 64, codebook=codebook, activation=Int(6, mode="static", range="histogram"))
    again = Scheme.from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme and isinstance(again.codebook, Int) and isinstance(again.activation, Int)
    assert hash(again) == hash(scheme)
    policy = {"a.*": scheme, "*": None}
    assert from_json(to_json(policy)) == policy


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook": Int(8, activation=Int(8))}, "codebook of plain integers"),
        ({"codebook": Int(8, rounding="gptq")}, "codebook of plain integers"),
        ({"codebook": Int(8, mode="static")}, "are of activations"),
        ({"codebook": Int(8, per="token")}, "are of activations"),
        ({"codebook": Int(8, "group:3")}, "cannot cut rows of 8"),
        ({"activation": Int(8, activation=Int(8))}, "PQ: an activation has no activation"),
        ({"activation": Int(8, mode="static", per="token")}, "PQ: a static activation"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PQ(8, 64, **options)


@each_codebook
def test_embedding_decodes_the_rows_asked_for(codebook):
    packed = PQ(4, 20, codebook=codebook).encode(torch.randn(30, 16))
    for ids in (torch.tensor([3, 3, 29]), torch.randint(0, 30, (2, 5)), torch.empty(0, 4, dtype=torch.long)):
        assert torch.equal(packed.embedding(ids), packed.decode()[ids])


@each_codebook
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_round_once(codebook, dtype):
    weight = torch.randn(32, 16).to(dtype)
    packed, expected = (PQ(4, 16, codebook=codebook).encode(w) for w in (weight, weight.float()))
    assert packed.decode().dtype == dtype
    assert torch.equal(packed.decode(), expected.decode().to(dtype))
    moved = PQ(4, 16, codebook=codebook).encode(weight.float()).to(dtype)
    assert torch.equal(moved.decode(), expected.decode().to(dtype))
    assert moved.codebook.scale.dtype == torch.float32


@each_codebook
def test_going_on_from_an_earlier_codebook(codebook):
    weight, scheme = torch.randn(128, 32), PQ(4, 16, codebook=codebook, n_iter=2)
    once = scheme.encode(weight)
    twice = scheme.encode(weight, once)
    errors = [(packed.decode() - weight).square().mean() for packed in (once, twice)]
    assert errors[1] < errors[0] * 1.02
    stored = {key: value.clone() for key, value in once.state_dict().items()}
    scheme.encode(weight, once)
    assert all(torch.equal(value, stored[key]) for key, value in once.state_dict().items())


@each_codebook
def test_exact_noise_reads_the_integer_codewords(codebook):
    weight = nn.Parameter(torch.randn(32, 16))
    noise = WeightNoise(weight, PQ(4, 8, codebook=codebook))
    generator = torch.Generator().manual_seed(0)
    noise.draw(weight, 0.5, generator)
    codewords = torch.from_numpy(levels(noise.target))
    with torch.no_grad():
        weight.add_(torch.randn(32, 16))
    noise.draw(weight, 0.5, generator)
    noisy, blocks = noise.apply(weight), weight.detach().view(-1, 4)
    for i, dropped in enumerate(noise.mask.flatten().tolist()):
        nearest = codewords[(blocks[i] - codewords).square().sum(dim=1).argmin()]
        assert torch.equal(noisy.view(-1, 4)[i], nearest if dropped else blocks[i])


def steps_of(held, weight, n=5):
    """A few steps towards a random target, as `Quantize` makes them."""
    parameters = [weight] if held.codebook is None else [weight, held.codebook]
    optimizer, target = torch.optim.SGD(parameters, lr=0.3), torch.randn(weight.shape)
    for _ in range(n):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        held.before_step()
        optimizer.step()
        held.after_step()


@each_codebook
@pytest.mark.parametrize("hold", [TiedWeight, LatentWeight])
def test_what_is_packed_is_within_rounding_of_what_was_trained(codebook, hold):
    weight = nn.Parameter(torch.randn(32, 16))
    with torch.no_grad():
        weight[:3] = 0
    held = hold(weight, PQ(4, 12, codebook=codebook).encode(weight))
    held.start()
    assert (weight[:3] == 0).all()
    steps_of(held, weight)
    packed = held.pack()
    assert isinstance(packed.codebook, IntWeight)
    assert (packed.decode()[:3] == 0).all() and (weight[:3] == 0).all()
    shown = weight.detach()
    assert len(shown.view(-1, 4).unique(dim=0)) <= 12
    largest = packed.codebook.scale.max().item()
    cut = codebook.range == "mse"  # its ends may be cut
    assert (packed.decode() - shown).abs().max() <= largest * (4 if cut else 0.75)
    np.testing.assert_array_equal(packed.codewords(), levels(packed))
    if not cut:  # what is packed again is what was packed
        again = packed.decode()
        packed.write_codebook(packed.codewords())
        torch.testing.assert_close(packed.decode(), again, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hold", [TiedWeight, LatentWeight])
def test_held_weights_go_on_bit_equally(hold):
    def make():
        torch.manual_seed(3)
        weight = nn.Parameter(torch.randn(32, 16))
        held = hold(weight, PQ(4, 12, codebook=CODEBOOKS[0]).encode(weight))
        held.start()
        steps_of(held, weight)
        return weight, held

    weight, held = make()
    other = nn.Parameter(weight.detach().clone())
    restored = hold(other, held.packed.scheme.encode(weight.detach()))
    restored.load_state_dict({key: value.clone() for key, value in held.state_dict().items()})
    torch.manual_seed(5)
    steps_of(held, weight)
    torch.manual_seed(5)
    steps_of(restored, other)
    assert torch.equal(weight, other)
    assert torch.equal(held.pack().decode(), restored.pack().decode())


def test_tied_layers_share_one_codebook(tmp_path):
    model = TiedByName()
    policy = {"embed": PQ(4, 8, codebook=CODEBOOKS[0], activation=Int(8))}
    predicted = size_table(model, policy).bytes
    quantize(model, policy)
    assert model.out.packed("weight") is model.embed.packed("weight")
    assert save(model, tmp_path / "m.safetensors") == predicted
    ids = torch.arange(20).view(4, 5)
    again = load(TiedByName(), tmp_path / "m.safetensors")
    assert torch.equal(again(ids), model(ids)) and again.out.packed("weight") is again.embed.packed("weight")
    dense = model.embed.packed("weight").decode()
    x = dense[ids]
    assert torch.equal(model.embed(ids), x)  # a table quantizes no input
    scale, low = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / 255, x.amin(-1).clamp(max=0)
    zero = (-low / scale).round()[..., None]
    rounded = (((x / scale[..., None]).round() + zero).clamp(0, 255) - zero) * scale[..., None]
    torch.testing.assert_close(model(ids), rounded @ dense.T, rtol=1e-4, atol=1e-5)


def test_a_codebook_of_few_codewords_adapts():
    scheme = PQ(4, 256, codebook=CODEBOOKS[0]).adapt((16, 8))
    assert scheme.n_centroids == 32 and scheme.codebook == CODEBOOKS[0]
