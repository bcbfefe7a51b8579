"""Noise beside what torch does to modules: checkpointing, compile, pickle, dtypes, pruning."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import Attention, Recurrent, TiedByName, TiedByRead, dense, gradients, mlp, noisy
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lightning_qnoise import PQ, Int, quantize
from lightning_qnoise.attach import attach, detach
from lightning_qnoise.policy import resolve

X = torch.linspace(-1, 1, 4 * 16).view(4, 16)


class CheckpointedHead(nn.Module):
    """A tied output product that is recomputed in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.reentrant = reentrant

    def head(self, h):
        return F.linear(h, self.embed.weight)

    def forward(self, ids):
        h = self.embed(ids).tanh()
        return self.head(h) if self.reentrant is None else checkpoint(self.head, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [mlp, lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)])
def test_activation_checkpointing_gives_equal_gradients(make, reentrant):
    model, x = make(), X.clone().requires_grad_()
    clean = gradients(model, lambda: model(x))
    noisy(model, rate=0.9)
    expected = gradients(model, lambda: model(x))
    got = gradients(model, lambda: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(got[:1], clean[:1], strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_table_that_is_read_again_in_the_backward_pass_is_still_noisy(reentrant):
    torch.manual_seed(0)
    plain = CheckpointedHead(None)
    model = CheckpointedHead(reentrant)
    model.load_state_dict(plain.state_dict())
    ids = torch.arange(20)
    for each in (plain, model):
        noisy(each, rate=0.9)
    expected = gradients(plain, lambda: plain(ids))
    assert torch.equal(gradients(model, lambda: model(ids))[0], expected[0])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [mlp, Attention, TiedByName, lambda: Recurrent(nn.LSTM)])
def test_a_copy_of_a_noisy_model_is_plain(make, copier):
    model = make()
    classes = [type(m) for m in model.modules()]
    state = set(model.__dict__)
    noisy(model, rate=1.0)
    twin = copier(model)
    assert [type(m) for m in twin.modules()] == classes
    assert set(twin.__dict__) == state
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert not any(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    x = torch.arange(6) if isinstance(model, TiedByName) else X[:, :8] if isinstance(model, Recurrent) else X
    detach(model)
    assert torch.equal(twin(x), model(x))
    attach(twin, resolve(twin, "int8"))  # a copy can be noised again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("policy", ["pq", "int8"])
def test_weights_of_other_dtypes(dtype, policy):
    model = mlp().to(dtype)
    noises = noisy(model, policy, rate=1.0)
    weight = model[0].weight.detach()
    scheme = noises["0.weight"].scheme
    expected = (noises["0.weight"].target if policy == "pq" else scheme.encode(weight)).decode()
    read = noises["0.weight"].apply(model[0].weight)
    assert read.dtype == dtype
    assert torch.equal(read, expected)
    out = model(X.to(dtype))
    out.sum().backward()
    assert out.dtype == model[0].weight.grad.dtype == dtype


@pytest.mark.parametrize("policy", ["pq", "int8"])
def test_autocast(policy):
    model = mlp()
    noises = noisy(model, policy, rate=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
        expected = dense(model, noises)(X)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("policy", [PQ(8, 8), Int(4)])
def test_a_forward_at_rate_one_is_that_of_the_packed_model(policy):
    model = mlp()
    packed = quantize(copy.deepcopy(model), {"*": policy})
    noisy(model, {"*": policy}, rate=1.0)
    torch.testing.assert_close(model(X), packed(X), rtol=1e-6, atol=1e-6)  # sums are taken in another order


def test_channels_last_convolutions():
    model = nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    x = torch.randn(2, 16, 5, 5)
    got, expected = [], []
    for each, out in ((model, got), (twin, expected)):
        noises = noisy(each, rate=0.5, kind="zero")
        out.append(noises["weight"].apply(each.weight))
        out.append(each(x))
        out[-1].sum().backward()
        out.append(each.weight.grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_functional_call_noises_the_given_weights():
    model = nn.Linear(16, 8)
    noises = noisy(model, {"*": Int(2)}, rate=1.0)
    weights = {"weight": torch.randn(8, 16), "bias": torch.randn(8)}
    got = torch.func.functional_call(model, weights, X)
    packed = noises["weight"].scheme.encode(weights["weight"])
    torch.testing.assert_close(got, F.linear(X, packed.decode(), weights["bias"]))
    grads = torch.func.grad(lambda w: torch.func.functional_call(model, w, X).sum())(weights)
    torch.testing.assert_close(grads["weight"], X.sum(dim=0).expand(8, 16))


def test_pruning_after_attaching_and_making_it_permanent():
    model = nn.Linear(16, 8)
    noises = noisy(model, {"*": Int(2)}, rate=1.0)
    prune.l1_unstructured(model, "weight", amount=0.5)
    pruned = model.weight_orig.detach() * model.weight_mask
    assert torch.equal(model.weight.detach(), pruned)
    expected = noises["weight"].scheme.encode(pruned).decode()
    torch.testing.assert_close(model(X), F.linear(X, expected, model.bias))
    prune.remove(model, "weight")
    assert torch.equal(model.weight, pruned)
    torch.testing.assert_close(model(X), F.linear(X, expected, model.bias))
    detach(model)
    assert type(model) is nn.Linear
    torch.testing.assert_close(model(X), F.linear(X, pruned, model.bias))


def test_a_pruned_or_parametrized_layer_is_refused_or_skipped():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    parametrizations.weight_norm(model[1])
    assert list(resolve(model, "int8")) == ["2.weight"]
    with pytest.raises(ValueError, match="recomputed in every forward"):
        resolve(model, {"0": Int(8)})
    noises = noisy(model, "int8", rate=1.0)
    model(X).sum().backward()
    assert list(noises) == ["2.weight"]


def test_a_list_of_parameters_is_noised_when_named_in_full():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ParameterList([torch.randn(16, 16), torch.randn(16, 16)])

        def forward(self, x):
            return x @ self.tables[0] @ self.tables[1]

    model = Own()
    noisy(model, {"tables.1": Int(2)}, rate=1.0)
    expected = X @ model.tables[0] @ Int(2).encode(model.tables[1]).decode()
    torch.testing.assert_close(model(X), expected)
    assert not torch.allclose(model(X), X @ model.tables[0] @ model.tables[1])


def test_moving_a_noisy_recurrent_layer_keeps_its_weights_together():
    model = Recurrent(nn.LSTM)
    noisy(model, rate=0.5, kind="zero")
    model.double()
    model(torch.randn(2, 3, 8).double())
    assert all(isinstance(weight, nn.Parameter) for weight in model.rnn.__dict__["_flat_weights"])
    detach(model)
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    assert model(torch.randn(2, 3, 8).double()).dtype == torch.float64


def test_a_forward_that_ddp_left_on_the_instance_hides_nothing():
    ids, model = torch.arange(20), TiedByRead()
    plain = copy.deepcopy(model)
    model.forward = model.forward  # what Lightning's redirection through the DDP wrapper amounts to
    noises = noisy(model, rate=1.0)
    model.forward = model.forward
    torch.testing.assert_close(model(ids), dense(plain, noises)(ids))
    detach(model)
    assert torch.equal(model(ids), plain(ids))


def test_an_error_in_a_forward_closes_the_window():
    model = nn.Linear(16, 8)
    noises = noisy(model, rate=1.0)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert noises["weight"].window == 0
    assert model.weight is model._parameters["weight"]


def test_an_attribute_that_was_deleted_is_missing_in_the_usual_words():
    model = nn.Linear(16, 8)
    attach(model, {"weight": PQ(4, 4)})
    del model.weight
    with pytest.raises(AttributeError, match="'NoisyLinear' object has no attribute 'weight'"):
        _ = model.weight
