"""Latent weights against leaves of autograd: latent and codebook, read as `C[codes] + L - L.detach()`."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TiedByName
from references import int_reference, squared_distances
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam

from lightning_qnoise import PQ, Int
from lightning_qnoise.latent import LatentWeight

OPTIMIZERS = {
    "sgd": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "adam": lambda params: Adam(params, lr=0.01),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
IDS = [torch.randint(21, (32, 3), generator=torch.Generator().manual_seed(i)) for i in range(10)]
IDS_20 = [ids % 20 for ids in IDS]
ROWS = [torch.randn(32, 16, generator=torch.Generator().manual_seed(i)) for i in range(10)]
IMAGES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(10)]


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def conv():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    return model.to(memory_format=torch.channels_last)


def padded():
    return nn.Sequential(nn.Embedding(21, 10, padding_idx=0), nn.Flatten(), nn.Linear(30, 4))


def pruned():
    """Half of the blocks are zero, and small ones join their codeword."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[::2, 4:12] = 0
        model[0].weight[1::4] *= 0.05
    return model


TASKS = {  # model, its weight, scheme, inputs
    "linear": (mlp, "0.weight", PQ(4, 16), ROWS),
    "conv": (conv, "0.weight", PQ(9, 5), IMAGES),
    "padding": (padded, "0.weight", PQ(5, 6), IDS),
    "shared": (TiedByName, "embed.weight", PQ(4, 11), IDS_20),
    "pruned": (pruned, "0.weight", PQ(4, 7), ROWS),
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
INTS = [Int(4), Int(3, "tensor", symmetric=True), Int(2, "group:4")]
each_int = pytest.mark.parametrize("scheme", INTS, ids=str)


def loss_of(logits):
    """Cross entropy with labels that only depend on the place."""
    logits = logits.flatten(0, -2)
    return F.cross_entropy(logits.float(), torch.arange(len(logits)) % logits.shape[-1])


def hold(model, name, scheme):
    parameter = model.get_parameter(name)
    held = LatentWeight(parameter, scheme.encode(parameter))
    held.start()
    return held


def with_codebook(model, held):
    return [*model.parameters(), *([] if held.codebook is None else [held.codebook])]


def train(model, held, optimizer, inputs, n_steps):
    """What the callback does around each step."""
    for i in range(n_steps):
        optimizer.zero_grad()
        loss_of(model(inputs[i % len(inputs)])).backward()
        held.before_step()
        optimizer.step()
        held.after_step()
        yield held.parameter.detach().clone()


def nearest_reference(latent, codebook):
    blocks = latent.detach().numpy().reshape(-1, codebook.shape[1])
    return torch.from_numpy(squared_distances(blocks, codebook.detach().numpy()).argmin(axis=1))


def train_explicit(model, name, packed, make, inputs, n_steps):
    """Shown weight, latent weight, codebook and codes after each step, latent and codebook being leaves."""
    latent = nn.Parameter(model.get_parameter(name).detach().clone())
    codebook = nn.Parameter(packed.codebook.float().clone())
    size = codebook.shape[1]
    zero, pruned = codebook.abs().sum(dim=1) == 0, latent.reshape(-1, size).abs().sum(dim=1) == 0
    codes = nearest_reference(latent, codebook)
    optimizer = make([latent, codebook, *(p for n, p in model.named_parameters() if n != name)])
    for i in range(n_steps):
        optimizer.zero_grad()
        weight = codebook[codes].view(latent.shape) + (latent - latent.detach())
        loss_of(functional_call(model, {name: weight}, inputs[i % len(inputs)])).backward()
        codebook.grad /= torch.tensor([max(1, codes.tolist().count(k)) for k in range(len(codebook))])[:, None]
        codebook.grad[zero] = 0
        latent.grad *= (~pruned[:, None]).expand(-1, size).reshape(latent.shape)
        optimizer.step()
        codes = nearest_reference(latent, codebook)
        yield codebook[codes].view(latent.shape).detach(), latent.detach(), codebook.detach(), codes


@each_task
@each_optimizer
def test_training_is_that_of_explicit_leaves(task, make):
    build, name, scheme, inputs = task
    model = build()
    twin = copy.deepcopy(model)
    held = hold(model, name, scheme)
    first, start = held.codes.clone(), held.latent.clone()
    ours = train(model, held, make(with_codebook(model, held)), inputs, 100)
    for got, expected in zip(ours, train_explicit(twin, name, held.packed, make, inputs, 100), strict=True):
        shown, latent, codebook, codes = expected
        assert torch.equal(held.codes, codes)
        assert (got - shown).abs().max() < 3e-6
        assert (held.latent - latent).abs().max() < 3e-6
        assert (held.codebook - codebook).abs().max() < 3e-6
    assert not torch.equal(held.codes, first)
    assert (held.latent - start).abs().max() > 0.03
    for (other, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other != name:
            assert (p - q).abs().max() < 1e-5, other


@each_int
@each_optimizer
def test_training_of_integers_is_that_of_an_explicit_leaf(scheme, make):
    model = mlp()
    twin, held = copy.deepcopy(model), hold(model, "0.weight", scheme)
    latent = nn.Parameter(twin[0].weight.detach().clone())
    optimizer = make([latent, *list(twin.parameters())[1:]])

    def shown():
        found = int_reference(latent.detach().numpy(), scheme.bits, scheme.granularity, scheme.symmetric)[-1]
        return torch.from_numpy(found.astype(np.float32))

    assert held.codebook is None
    before = shown()
    assert torch.equal(model[0].weight, before)
    for i, got in enumerate(train(model, held, make(model.parameters()), ROWS, 100)):
        optimizer.zero_grad()
        weight = shown() + (latent - latent.detach())
        loss_of(functional_call(twin, {"0.weight": weight}, ROWS[i % len(ROWS)])).backward()
        optimizer.step()
        assert (got - shown()).abs().max() < 3e-6
        assert (held.latent - latent).abs().max() < 3e-6
    assert not torch.equal(got, before)
    assert torch.equal(held.pack().decode(), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each_task
def test_the_parameter_shows_codewords_except_in_a_step(task, dtype):
    build, name, scheme, inputs = task
    model = build().to(dtype)
    held = hold(model, name, scheme)
    optimizer = SGD(with_codebook(model, held), lr=0.05)
    latent = held.latent.clone()
    for i in range(3):
        codes = nearest_reference(held.latent.float(), held.codebook)
        assert torch.equal(held.parameter, held.codebook[codes].view_as(latent).to(dtype))
        x = inputs[i] if inputs[i].dtype == torch.int64 else inputs[i].to(dtype)
        loss_of(model(x)).backward()
        held.before_step()
        assert torch.equal(held.parameter, latent)
        assert held.codebook.grad.dtype == held.codebook.dtype == torch.float32
        optimizer.step()
        assert held.parameter.dtype == held.latent.dtype == dtype
        latent = held.parameter.detach().clone()
        assert not torch.equal(latent, held.latent)
        held.after_step()
        assert torch.equal(held.latent, latent)
        assert not torch.equal(held.parameter, latent)


@pytest.mark.parametrize("scheme", [PQ(4, 16), PQ(4, 16, codebook_dtype="float32"), Int(3)], ids=repr)
def test_a_skipped_step_and_a_second_after_step_change_nothing(scheme):
    model = mlp()
    held = hold(model, "0.weight", scheme)
    optimizer = Adam(with_codebook(model, held), lr=0.05)
    for _ in range(5):
        list(train(model, held, optimizer, ROWS, 1))
        before = [value.detach().clone() for value in (model[0].weight, *held.state_dict().values())]
        held.after_step()
        loss_of(model(ROWS[0])).backward()
        held.before_step()
        held.after_step()
        after = [model[0].weight, *held.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("scheme", [PQ(4, 16), Int(3)], ids=str)
def test_a_frozen_weight_stays_as_it_is(scheme):
    model = mlp()
    model[0].requires_grad_(False)
    held = hold(model, "0.weight", scheme)
    before, latent = model[0].weight.clone(), held.latent.clone()
    optimizer = Adam(with_codebook(model, held), lr=0.05, weight_decay=0.1)
    for got in train(model, held, optimizer, ROWS, 3):
        assert torch.equal(got, before)
        assert torch.equal(held.latent, latent)
    assert held.parameter.grad is None and (held.codebook is None or held.codebook.grad is None)


MOVERS = {
    **OPTIMIZERS,
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.02),
}
if hasattr(torch.optim, "Muon"):
    MOVERS["muon"] = lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.02)


@pytest.mark.parametrize("name", ["padding", "pruned"])
@pytest.mark.parametrize("make", MOVERS.values(), ids=MOVERS)
def test_blocks_of_zeros_stay_exactly_zero(name, make):
    """Also where an optimizer moves what has no gradient."""
    build, name, scheme, inputs = TASKS[name]
    model = build()
    held = hold(model, name, scheme)
    zeros = held.latent.view(-1, scheme.block_size).eq(0).all(dim=1)
    codewords = held.codebook.eq(0).all(dim=1)
    assert zeros.any() and codewords.sum() == 1
    for got in train(model, held, make(with_codebook(model, held)), inputs, 20):
        assert not got.view(-1, scheme.block_size)[zeros].any()
        assert not held.latent.view(-1, scheme.block_size)[zeros].any()
        assert not held.codebook[codewords].any()
    assert held.latent.view(-1, scheme.block_size)[~zeros].all()


def test_pruned_blocks_have_no_part_in_the_norm_of_the_gradient():
    model = pruned()
    held = hold(model, "0.weight", PQ(4, 7))
    zeros = held.latent == 0
    loss_of(model(ROWS[0])).backward()
    plain = model[0].weight.grad.clone()
    held.before_step()
    assert plain[zeros].any()
    assert torch.equal(model[0].weight.grad, plain.masked_fill(zeros, 0.0))
    assert torch.equal(held.codebook.grad.any(dim=1), held.codebook.any(dim=1))


def test_zeros_that_are_moved_come_back():
    model = pruned()
    held = hold(model, "0.weight", PQ(4, 7))
    zeros, codewords = held.latent == 0, held.codebook == 0
    model[0].weight.grad = torch.zeros(32, 16)
    held.before_step()
    with torch.no_grad():
        model[0].weight += 1
        held.codebook += 1
    held.after_step()
    assert torch.equal(held.latent == 0, zeros) and torch.equal(held.codebook == 0, codewords)
    assert not model[0].weight[zeros].any()


@each_task
def test_pack_decodes_to_what_is_shown_up_to_the_rounding_of_its_codebook(task):
    build, name, scheme, inputs = task
    model = build()
    held = hold(model, name, scheme)
    before = held.packed.decode()
    *_, last = train(model, held, Adam(with_codebook(model, held), lr=0.01), inputs, 10)
    packed = held.pack()
    assert torch.equal(packed.decode(), last.half().float())
    assert not torch.equal(packed.decode(), before)
    assert torch.equal(packed.indices().flatten().long(), held.codes)
    assert packed.codebook.dtype == torch.float16


def test_the_encoding_stays_as_it_is_until_pack():
    model = mlp()
    held = hold(model, "0.weight", PQ(4, 16, codebook_dtype="float32"))
    before = copy.deepcopy(held.packed.state_dict())
    *_, last = train(model, held, Adam(with_codebook(model, held), lr=0.01), ROWS, 10)
    assert all(torch.equal(value, before[key]) for key, value in held.packed.state_dict().items())
    assert torch.equal(held.pack().decode(), last)


RESTORED = [*TASKS.values(), (mlp, "0.weight", Int(3), ROWS), (mlp, "0.weight", PQ(4, 16, "float32"), ROWS)]


@pytest.mark.parametrize("task", RESTORED, ids=[*TASKS, "int", "float32"])
@each_optimizer
def test_a_restored_one_goes_on_bit_equally(task, make):
    build, name, scheme, inputs = task
    model = build()
    held = hold(model, name, scheme)
    optimizer = make(with_codebook(model, held))
    list(train(model, held, optimizer, inputs, 5))
    torch.save([held.state_dict(), model.state_dict(), optimizer.state_dict()], "state.pt")
    state = torch.load("state.pt", weights_only=True)
    twin = build()
    twin.load_state_dict(state[1])
    parameter = twin.get_parameter(name)
    empty = scheme.empty(parameter.shape, parameter.dtype)
    for buffer in empty.buffers():  # what memory may hold
        buffer.fill_(torch.nan if buffer.is_floating_point() else 255)
    restored = LatentWeight(parameter, empty)
    restored.load_state_dict(state[0])
    other = make(with_codebook(twin, restored))
    other.load_state_dict(state[2])
    assert torch.equal(parameter, model.get_parameter(name))
    ours, theirs = train(model, held, optimizer, inputs, 5), train(twin, restored, other, inputs, 5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert all(
            torch.equal(v, w) for v, w in zip(held.state_dict().values(), restored.state_dict().values(), strict=True)
        )
    states = list(zip(optimizer.state.values(), other.state.values(), strict=True))
    assert len(states) == len(with_codebook(model, held))
    assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for a, b in states for key in a)
    assert torch.equal(held.pack().decode(), restored.pack().decode())


def test_a_pruned_block_and_one_that_only_shows_zeros_are_told_apart_in_a_restored_one():
    model = pruned()
    held = hold(model, "0.weight", PQ(4, 7))
    shows_zero = (held.parameter == 0) & (held.latent != 0)
    assert shows_zero.any()
    twin = copy.deepcopy(model)
    restored = LatentWeight(twin[0].weight, PQ(4, 7).empty((32, 16)))
    restored.load_state_dict(held.state_dict())
    list(train(twin, restored, SGD(twin.parameters(), lr=0.1), ROWS, 1))
    assert (restored.latent != held.latent)[shows_zero].any()
