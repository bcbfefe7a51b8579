"""Tied weights against an explicit codebook: a Parameter of its own that autograd trains with mean gradients."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TiedByName
from references import pq_reference
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam, AdamW

from lightning_qnoise import PQ
from lightning_qnoise.tied import TiedWeight, _sums_in_place, _sums_sorted, codeword_sums

OPTIMIZERS = {
    "sgd": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "adam": lambda params: Adam(params, lr=0.01),
    "adamw": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
}
IDS = [torch.randint(21, (32, 3), generator=torch.Generator().manual_seed(i)) for i in range(10)]
ROWS = [torch.randn(32, 16, generator=torch.Generator().manual_seed(i)) for i in range(10)]
IMAGES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(10)]
IDS_20 = [ids % 20 for ids in IDS]


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def odd():
    return nn.Sequential(nn.Linear(16, 21), nn.Tanh(), nn.Linear(21, 11), nn.Linear(11, 4))


def conv():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def padded():
    return nn.Sequential(nn.Embedding(21, 10, padding_idx=0), nn.Flatten(), nn.Linear(30, 4))


def pruned():
    model = mlp()
    with torch.no_grad():
        model[0].weight[::3, 4:8] = 0
    return model


def repeated():
    """Only three distinct blocks."""
    model = mlp()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(3, 4)[torch.arange(128) % 3].view(32, 16))
    return model


TASKS = {  # model, its weight, scheme, inputs
    "linear": (mlp, "0.weight", PQ(4, 16), ROWS),
    "odd": (odd, "2.weight", PQ(7, 5), ROWS),
    "conv": (conv, "0.weight", PQ(9, 5), IMAGES),
    "padding": (padded, "0.weight", PQ(5, 6), IDS),
    "shared": (TiedByName, "embed.weight", PQ(4, 11), IDS_20),
    "pruned": (pruned, "0.weight", PQ(4, 7), ROWS),
    "unused": (repeated, "0.weight", PQ(4, 8), ROWS),
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def loss_of(logits):
    """Cross entropy with labels that only depend on the place."""
    logits = logits.flatten(0, -2)
    return F.cross_entropy(logits.float(), torch.arange(len(logits)) % logits.shape[-1])


def tie(model, name, scheme):
    parameter = model.get_parameter(name)
    tied = TiedWeight(parameter, scheme.encode(parameter))
    tied.start()
    return tied


def train(model, tied, optimizer, inputs, n_steps):
    """What the callback does around each step."""
    for i in range(n_steps):
        optimizer.zero_grad()
        loss_of(model(inputs[i % len(inputs)])).backward()
        tied.before_step()
        optimizer.step()
        tied.after_step()
        yield tied.parameter.detach().clone()


def train_explicit(model, name, packed, make, inputs, n_steps):
    """The value of the weight after each step, of codewords that are a Parameter."""
    codebook = nn.Parameter(packed.codebook.float())
    codes, shape = packed.indices().flatten().long(), model.get_parameter(name).shape
    counts = torch.tensor([max(1, codes.tolist().count(k)) for k in range(len(codebook))])
    zero = packed.codebook.float().abs().sum(dim=1) == 0
    optimizer = make([codebook, *(p for n, p in model.named_parameters() if n != name)])
    for i in range(n_steps):
        optimizer.zero_grad()
        weight = codebook[codes].view(shape)
        loss_of(functional_call(model, {name: weight}, inputs[i % len(inputs)])).backward()
        codebook.grad /= counts[:, None]
        codebook.grad[zero] = 0
        optimizer.step()
        yield codebook[codes].view(shape).detach()


def assert_tied(values, codes):
    """All blocks of a codeword are bit-equal."""
    blocks = values.detach().reshape(codes.numel(), -1)
    for code in codes.unique():
        assert len(blocks[codes.flatten() == code].unique(dim=0)) == 1, int(code)


def means_reference(values, codes):
    """Every block replaced by the float64 mean over its codeword."""
    blocks = values.detach().double().numpy().reshape(codes.numel(), -1)
    codes = codes.flatten().numpy()
    return np.stack([blocks[codes == code].mean(axis=0) for code in codes]).reshape(values.shape)


@each_task
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_that_of_an_explicit_codebook(task, make):
    build, name, scheme, inputs = task
    model = build()
    tied = tie(model, name, scheme)
    twin, codes, start = copy.deepcopy(model), tied.packed.indices(), tied.parameter.detach().clone()
    ours = train(model, tied, make(model.parameters()), inputs, 100)
    for got, expected in zip(ours, train_explicit(twin, name, tied.packed, make, inputs, 100), strict=True):
        assert (got - expected).abs().max() < 1e-6
        assert_tied(got, codes)
    assert (got - start).abs().max() > 0.03
    assert torch.equal(tied.packed.indices(), codes)
    for (other, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other != name:
            assert (p - q).abs().max() < 1e-5, other


def test_start_shows_the_decoded_weight():
    model = odd()
    tied = tie(model, "2.weight", PQ(7, 5))
    expected = pq_reference(tied.packed.indices().numpy(), tied.packed.codebook.float().numpy(), (11, 21))
    assert np.array_equal(model[2].weight.detach().numpy(), expected)
    assert tied.codebook is None


@pytest.mark.parametrize("name", ["padding", "pruned"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_blocks_of_zeros_stay_exactly_zero(name, make):
    build, name, scheme, inputs = TASKS[name]
    model = build()
    zeros = model.get_parameter(name).view(-1, scheme.block_size).eq(0).all(dim=1)
    assert zeros.any()
    *_, last = train(model, tie(model, name, scheme), make(model.parameters()), inputs, 20)
    assert not last.view(-1, scheme.block_size)[zeros].any()
    assert last.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_blocks_stay_equal_where_kernels_round_the_last_elements_otherwise(dtype, kind):
    more = {"momentum": 0.9} if kind is SGD else {"eps": 1e-4, "fused": kind is AdamW}
    model = odd().to(dtype)
    tied = tie(model, "2.weight", PQ(7, 5))
    codes, start = tied.packed.indices(), tied.parameter.detach().clone()
    for got in train(model, tied, kind(model.parameters(), lr=0.05, **more), [x.to(dtype) for x in ROWS], 20):
        assert got.dtype == dtype
        assert_tied(got, codes)
    assert (got - start).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each_task
def test_gradients_become_means_in_place(task, dtype):
    build, name, scheme, _ = task
    model = build().to(dtype)
    tied = tie(model, name, scheme)
    gradient = tied.parameter.grad = torch.randn_like(tied.parameter)
    expected = means_reference(gradient, tied.codes) * (tied.parameter.detach().double().numpy() != 0)
    tied.before_step()
    assert tied.parameter.grad is gradient and gradient.dtype == dtype
    assert_tied(gradient, tied.codes)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    np.testing.assert_allclose(gradient.double().numpy(), expected, rtol=eps, atol=eps)


def test_a_codeword_of_one_block_takes_its_gradient():
    weight, packed = nn.Parameter(torch.empty(3, 2)), PQ(2, 4).empty((3, 2))
    packed.write_codes(torch.tensor([2, 2, 1]))
    packed.write_codebook(torch.arange(1.0, 9.0).view(4, 2))
    TiedWeight(weight, packed).start()
    assert weight.tolist() == [[5, 6], [5, 6], [3, 4]]
    weight.grad = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]])
    TiedWeight(weight, packed).before_step()
    assert weight.grad.tolist() == [[2, 4], [2, 4], [5, 7]]


def test_accumulated_gradients():
    model = mlp()
    tied = tie(model, "0.weight", PQ(4, 16))
    codebook = nn.Parameter(tied.packed.codebook.float())
    counts = torch.bincount(tied.codes, minlength=16)[:, None]
    twin = copy.deepcopy(model)
    optimizer, reference = SGD([tied.parameter], lr=0.1, momentum=0.9), SGD([codebook], lr=0.1, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad(), reference.zero_grad()
        for x in ROWS[:3]:
            loss_of(model(x)).backward()
            loss_of(functional_call(twin, {"0.weight": codebook[tied.codes].view(32, 16)}, x)).backward()
            tied.after_step()  # the end of a batch without a step
        tied.before_step()
        codebook.grad /= counts
        optimizer.step(), reference.step()
        tied.after_step()
        assert (tied.parameter - codebook[tied.codes].view(32, 16)).abs().max() < 1e-6


def test_without_a_gradient_or_a_step_nothing_changes():
    model = mlp()
    tied = tie(model, "0.weight", PQ(4, 16))
    before = model[0].weight.detach().clone()
    model[0].weight.requires_grad_(False)
    for frozen in (True, False):
        tied.before_step()
        tied.after_step()
        assert torch.equal(model[0].weight, before)
        assert (model[0].weight.grad is None) == frozen
        model[0].weight.requires_grad_(True)
        loss_of(model(ROWS[0])).backward()


NOT_ELEMENTWISE = {"adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05)}
if hasattr(torch.optim, "Muon"):
    NOT_ELEMENTWISE["muon"] = lambda params: torch.optim.Muon(params, lr=0.05)


@pytest.mark.parametrize("name", ["linear", "pruned"])
@pytest.mark.parametrize("make", NOT_ELEMENTWISE.values(), ids=NOT_ELEMENTWISE)
def test_blocks_that_drift_apart_are_projected_on_their_mean(name, make):
    build, name, scheme, inputs = TASKS[name]
    model = build()
    tied = tie(model, name, scheme)
    zero, optimizer, losses = tied.parameter == 0, make([tied.parameter]), []
    tied.before_step(), tied.after_step()  # a first step that mixed precision skips
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model(inputs[0]))
        loss.backward()
        tied.before_step()
        optimizer.step()
        drifted = tied.parameter.detach().clone()
        assert len(drifted.view(-1, 4).unique(dim=0)) > 16
        tied.after_step()
        expected = np.where(zero, 0, means_reference(drifted, tied.codes))
        np.testing.assert_allclose(tied.parameter.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
        assert_tied(tied.parameter, tied.codes)
        after = tied.parameter.detach().clone()
        tied.after_step()
        assert torch.equal(tied.parameter, after)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_a_lone_block_of_zeros_that_is_moved_comes_back():
    model = nn.Sequential(nn.Embedding(21, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight[1:] += 3
    tied = tie(model, "0.weight", PQ(4, 6))
    assert tied.codes.tolist().count(tied.codes[0]) == 1 and not tied.parameter[0].any()
    with torch.no_grad():
        tied.parameter += 1
    tied.after_step()
    assert not tied.parameter[0].any() and tied.parameter[1].all()


def test_lbfgs():
    model = mlp()
    tied = tie(model, "0.weight", PQ(4, 16))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(ROWS[0]))
        loss.backward()
        tied.before_step()
        return loss

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure).item())
        tied.after_step()
        assert_tied(tied.parameter, tied.codes)
    assert losses[-1] < 0.8 * losses[0]


@each_task
def test_pack_takes_the_codewords_of_the_moment(task):
    build, name, scheme, inputs = task
    model = build()
    tied = tie(model, name, scheme)
    codes, before = tied.packed.indices(), tied.packed.decode()
    *_, last = train(model, tied, Adam(model.parameters(), lr=0.01), inputs, 10)
    packed = tied.pack()
    assert torch.equal(packed.decode(), last.half().float())
    assert not torch.equal(packed.decode(), before)
    assert torch.equal(packed.indices(), codes)
    assert packed.codebook.dtype == torch.float16


@each_task
@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], NOT_ELEMENTWISE["adafactor"]])
def test_a_restored_one_goes_on_bit_equally(task, make):
    build, name, scheme, inputs = task
    model = build()
    tied, optimizer = tie(model, name, scheme), make(model.parameters())
    list(train(model, tied, optimizer, inputs, 5))
    torch.save([tied.state_dict(), model.state_dict(), optimizer.state_dict()], "state.pt")
    state = torch.load("state.pt", weights_only=True)
    twin = build()
    twin.load_state_dict(state[1])
    parameter = twin.get_parameter(name)
    empty = scheme.empty(parameter.shape, parameter.dtype)
    empty.codes.fill_(255), empty.codebook.fill_(torch.nan)
    restored, other = TiedWeight(parameter, empty), make(twin.parameters())
    restored.load_state_dict(state[0])
    other.load_state_dict(state[2])
    ours, theirs = train(model, tied, optimizer, inputs, 5), train(twin, restored, other, inputs, 5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    states = zip(optimizer.state.values(), other.state.values(), strict=True)
    assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for a, b in states for key in a)
    assert torch.equal(tied.pack().decode(), restored.pack().decode())


SUMS = {"cpu": _sums_in_place, "gpu": _sums_sorted, "public": codeword_sums}


@pytest.mark.parametrize("add", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize(
    ("n", "k", "used"), [(5000, 37, range(37)), (3000, 256, range(5, 90, 3)), (7, 9, [0]), (1, 2, [1])]
)
def test_sums_are_those_of_float64(add, n, k, used):
    blocks, codes = torch.randn(n, 3), torch.tensor(list(used))[torch.randint(len(used), (n,))]
    expected = np.zeros((k, 3))
    np.add.at(expected, codes.numpy(), blocks.double().numpy())
    got = add(blocks, codes, k)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(add(blocks, codes, k), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_low_precision_are_added_in_fp32(dtype):
    blocks, codes = torch.rand(5000, 4).to(dtype), torch.randint(3, (5000,))
    expected = np.zeros((3, 4))
    np.add.at(expected, codes.numpy(), blocks.double().numpy())
    np.testing.assert_allclose(codeword_sums(blocks, codes, 3).numpy(), expected, rtol=1e-5)
