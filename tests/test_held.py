"""The weights of a model held together: one tied or latent weight for each, through a fit's save and resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from lightning_qnoise import PQ, Int
from lightning_qnoise.held import HeldWeights
from lightning_qnoise.latent import LatentWeight
from lightning_qnoise.tied import TiedWeight

SCHEMES = {"0.weight": PQ(4, 16), "2.weight": Int(3), "4.weight": PQ(8, 4, codebook_dtype="bfloat16")}
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
each_kind = pytest.mark.parametrize("reassign", [True, False])


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16))


def hold(model, reassign, names=tuple(SCHEMES)):
    held = HeldWeights(reassign)
    for name in names:
        parameter = model.get_parameter(name)
        held.add(name, parameter, SCHEMES[name].encode(parameter))
    return held


def adamw(model, held):
    """As the fit does it: codebooks in a group of their own, at a third of the rate."""
    optimizer = AdamW(model.parameters(), lr=0.01)
    codebooks = [codebook for _, codebook in held.codebooks()]
    if codebooks:
        optimizer.add_param_group({"params": codebooks, "lr": 0.01 / 3})
    return optimizer


def train(model, held, optimizer, n_steps):
    for i in range(n_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X[16 * (i % 4) :][:16]), torch.arange(16)).backward()
        held.before_step()
        optimizer.step()
        held.after_step()
    return [value.detach().clone() for value in model.state_dict().values()]


@each_kind
def test_added_weights_show_their_encoding(reassign):
    model = mlp()
    plain = copy.deepcopy(model)
    held = hold(model, reassign)
    for name, scheme in SCHEMES.items():
        assert torch.equal(model.get_parameter(name), scheme.encode(plain.get_parameter(name)).decode())
    for name in ("0.bias", "2.bias"):
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
    assert all(name in held for name in SCHEMES) and "0.bias" not in held


def test_codebooks_are_trained_beside_their_weights_only_where_blocks_are_assigned_anew():
    model = mlp()
    pairs = list(hold(model, True).codebooks())
    assert [weight is model[i].weight for i, (weight, _) in zip((0, 4), pairs, strict=True)] == [True, True]
    assert [(tuple(c.shape), c.dtype) for _, c in pairs] == [((16, 4), torch.float32), ((4, 8), torch.float32)]
    assert all(isinstance(codebook, nn.Parameter) for _, codebook in pairs)
    assert list(hold(mlp(), False).codebooks()) == []


@each_kind
def test_only_a_scheme_with_a_codebook_can_be_tied(reassign):
    held = hold(mlp(), reassign)
    kinds = [type(one) for one in held._held.values()]
    assert kinds == ([LatentWeight] * 3 if reassign else [TiedWeight, LatentWeight, TiedWeight])


@each_kind
def test_every_weight_is_trained_as_it_would_be_alone(reassign):
    model = mlp()
    twin, held = copy.deepcopy(model), hold(model, reassign)
    alone = [hold(twin, reassign, [name]) for name in SCHEMES]
    ours = adamw(model, held)
    theirs = AdamW(twin.parameters(), lr=0.01)
    books = [codebook for one in alone for _, codebook in one.codebooks()]
    theirs.add_param_group({"params": books, "lr": 0.01 / 3})
    before = train(model, held, ours, 0)
    after = train(model, held, ours, 10)
    for i in range(10):
        theirs.zero_grad()
        F.cross_entropy(twin(X[16 * (i % 4) :][:16]), torch.arange(16)).backward()
        for one in alone:
            one.before_step()
        theirs.step()
        for one in alone:
            one.after_step()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, twin.state_dict().values(), strict=True))


@each_kind
def test_a_skipped_step_and_a_second_call_change_nothing(reassign):
    model = mlp()
    held = hold(model, reassign)
    optimizer = adamw(model, held)
    before = train(model, held, optimizer, 3)
    F.cross_entropy(model(X[:16]), torch.arange(16)).backward()
    held.before_step()
    held.after_step()
    held.after_step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@each_kind
def test_packed_weights_decode_to_what_the_parameters_show(reassign):
    model = mlp()
    held = hold(model, reassign)
    train(model, held, adamw(model, held), 10)
    packed = held.pack()
    assert list(packed) == list(SCHEMES)
    for name, weight in packed.items():
        shown = model.get_parameter(name).detach()
        stored = getattr(torch, SCHEMES[name].codebook_dtype) if isinstance(SCHEMES[name], PQ) else torch.float32
        assert weight.scheme == SCHEMES[name]
        assert torch.equal(weight.decode(), shown.to(stored).float())


@each_kind
def test_state_is_plain_tensors_and_a_restored_one_goes_on_bit_equally(reassign):
    model = mlp()
    held = hold(model, reassign)
    optimizer = adamw(model, held)
    train(model, held, optimizer, 5)
    torch.save([held.state_dict(), model.state_dict(), optimizer.state_dict()], "state.pt")
    state = torch.load("state.pt", weights_only=True)
    assert type(state[0]) is dict and list(state[0]) == list(SCHEMES)
    assert all(type(one) is dict and {*map(type, one.values())} == {torch.Tensor} for one in state[0].values())
    twin, restored = mlp(), HeldWeights(reassign)
    twin.load_state_dict(state[1])
    for name, one in state[0].items():
        parameter = twin.get_parameter(name)
        empty = SCHEMES[name].empty(parameter.shape, parameter.dtype)
        for buffer in empty.buffers():  # what memory may hold
            buffer.zero_()
        restored.restore(name, parameter, empty, one)
        assert name in restored
    other = adamw(twin, restored)
    other.load_state_dict(state[2])
    for _ in range(5):
        ours, theirs = train(model, held, optimizer, 1), train(twin, restored, other, 1)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    moments = zip(optimizer.state.values(), other.state.values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in moments for key in a)
    packed = restored.pack()
    assert all(torch.equal(weight.decode(), packed[name].decode()) for name, weight in held.pack().items())
