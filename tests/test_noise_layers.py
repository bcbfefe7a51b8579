"""Noise in every kind of layer, against the same model with its noisy weights as plain dense ones."""

import copy

import pytest
import torch
from models import Attention, Gated, Recurrent, TiedByName, TiedByRead, TiedInContainer, dense, draw, noisy, small_pq
from torch import nn

from lightning_qnoise import Int
from lightning_qnoise.attach import attach, detach
from lightning_qnoise.policy import resolve

IDS = torch.arange(20).view(4, 5)
X = torch.linspace(-1, 1, 2 * 6 * 16).view(2, 6, 16)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), X),
    "embedding": (lambda: nn.Embedding(20, 16, padding_idx=0), IDS),
    "conv1x1": (lambda: nn.Conv2d(16, 8, 1), X.view(1, 16, 3, 4)),
    "conv3x3": (lambda: nn.Conv2d(16, 8, 3), X.view(1, 16, 3, 4)),
    "grouped": (lambda: nn.Conv2d(16, 8, 3, groups=4), X.view(1, 16, 3, 4)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), X.view(1, 16, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 8, 3), X.view(1, 16, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 4), X),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), X.view(1, 4, 3, 4, 4)),
    "attention": (lambda: Attention(batch_first=True), X),
    "attention_seq_first": (lambda: Attention(batch_first=False), X),
    "attention_kdim": (lambda: Attention(kdim=8), X),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), X),
    "lstm": (lambda: Recurrent(nn.LSTM), X[..., :8]),
    "gru": (lambda: Recurrent(nn.GRU), X[..., :8]),
    "own": (lambda: Gated(16, 24), X),
    "tied": (TiedByName, IDS),
    "tied_by_read": (TiedByRead, IDS),
    "tied_in_container": (TiedInContainer, IDS),
}
each_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    make, x = MODELS[name]
    return make(), x


@each_model
@pytest.mark.parametrize("policy", ["pq", "int4"])
def test_a_training_forward_is_that_of_the_dense_noisy_model(name, policy):
    model, x = build(name)
    noises = noisy(model, policy)
    expected = dense(model, noises)(x)
    clean = copy.deepcopy(model)(x)
    assert not torch.allclose(clean, expected, atol=1e-3)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@each_model
@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_zero_and_mean_noise(name, kind):
    model, x = build(name)
    noises = noisy(model, kind=kind)
    torch.testing.assert_close(model(x), dense(model, noises)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attribute", ["in_proj_weight", "out_proj.weight", "q_proj_weight", "k_proj_weight"])
def test_every_projection_of_attention_is_noised_on_its_own(attribute):
    model = Attention(kdim=8 if attribute[0] in "qk" else None)
    clean = model(X)
    noises = noisy(model, {f"attn.{attribute}": Int(2)}, rate=1.0)
    assert list(noises) == [f"attn.{attribute}"]
    assert not torch.allclose(model(X), clean, atol=1e-3)
    torch.testing.assert_close(model(X), dense(model, noises)(X))


@pytest.mark.parametrize("third", range(3), ids="qkv")
def test_noise_reaches_q_k_and_v_of_a_fused_projection(third):
    model = Attention()
    noises = noisy(model, {"attn.in_proj_weight": Int(2)}, rate=1.0)
    rows = torch.zeros_like(noises["attn.in_proj_weight"].mask)
    rows[third * 16 : third * 16 + 16] = True
    noises["attn.in_proj_weight"].mask = rows
    out = model(X)
    assert not torch.allclose(out, copy.deepcopy(model)(X), atol=1e-3)
    torch.testing.assert_close(out, dense(model, noises)(X))


@each_model
def test_training_forwards_and_attaching_leave_the_model_as_it_was(name):
    model, x = build(name)
    before = copy.deepcopy(model)
    identities = [(n, id(p)) for n, p in model.named_parameters()]
    modules = [(n, id(m), type(m)) for n, m in model.named_modules()]
    keys = list(model.state_dict())
    noises = attach(model, resolve(model, small_pq(model)))
    for step in range(3):
        draw(model, noises, rate=0.9, seed=step)
        model(x).sum().backward()
        assert list(model.state_dict()) == keys
        assert [(n, id(p)) for n, p in model.named_parameters()] == identities
    assert isinstance(model, type(before))
    detach(model)
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == modules
    assert [(n, id(p)) for n, p in model.named_parameters()] == identities
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert set(model.__dict__) == set(before.__dict__)
    model.eval(), before.eval()
    assert torch.equal(model(x), before(x))


@each_model
def test_an_eval_forward_is_bit_equal_to_the_plain_model(name):
    model, x = build(name)
    plain = copy.deepcopy(model).eval()
    noisy(model, rate=1.0)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))
