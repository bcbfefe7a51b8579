"""A weight under two names: packed once, still tied, counted once, decoded once."""

import copy

import pytest
import torch
from torch import nn

from lightning_qnoise import PQ, Int, dequantize, load, quantize, save, size_table
from lightning_qnoise.convert import dense_state_dict
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.first = self.second = nn.Linear(8, 8)

    def forward(self, ids):
        return self.second(self.first(self.embed(ids)).relu())


class OwnedByTheParent(nn.Module):
    """The model itself holds the table, and a child registered before has it too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 32, bias=False)
        self.extra_weight = nn.Parameter(torch.randn(4, 8))
        self.weight = self.head.weight

    def forward(self, ids):
        return self.head(nn.functional.embedding(ids, self.weight)) + self.extra_weight.sum()


MODELS = [TiedHead, SharedLayer, OwnedByTheParent]
each_model = pytest.mark.parametrize("make", MODELS)
each_policy = pytest.mark.parametrize("policy", [{"*": Int(4)}, {"*": PQ(2, 8)}], ids=["int4", "pq"])
ids = torch.tensor([[0, 1, 31], [3, 3, 2]])


def reference(make, packed):
    dense = make()
    with torch.no_grad():
        dense.load_state_dict(dense_state_dict(packed))
    return dense


@each_model
@each_policy
def test_packed_once_and_still_tied(make, policy):
    model = make()
    original = copy.deepcopy(model.state_dict())
    parameters = len(list(model.parameters()))
    quantize(model, policy)
    weights = dict(packed_weights(model))
    assert len(set(weights.values())) == len({id(w) for w in weights.values()}) < len(weights)
    assert list(dense_state_dict(model)) == list(original)
    torch.testing.assert_close(model(ids), reference(make, model)(ids))
    for name, weight in weights.items():  # every name reads what the first one had
        assert torch.equal(weight.decode(), policy["*"].adapt(weight.shape).encode(original[name]).decode())
    for other in (copy.deepcopy(model), model):
        assert len(list(dequantize(other).parameters())) == parameters
        assert list(other.state_dict()) == list(original)


@each_model
@each_policy
def test_counted_once_and_stored_once(make, policy, tmp_path):
    model = make()
    predicted = size_table(model, policy)
    assert predicted.float_bytes == sum(p.nbytes for p in model.parameters())
    quantize(model, policy)
    distinct = {b.data_ptr(): b.nbytes for b in [*model.buffers(), *model.parameters()]}
    assert sum(distinct.values()) == size_table(model).bytes == predicted.bytes == save(model, tmp_path / "m")
    again = load(make(), tmp_path / "m")
    assert len(set(dict(packed_weights(again)).values())) == len(set(dict(packed_weights(model)).values()))
    assert torch.equal(again(ids), model(ids))
    with torch.device("meta"):
        skeleton = make()
    assert torch.equal(load(skeleton, tmp_path / "m")(ids), model(ids))


@each_model
@pytest.mark.parametrize("export", [dequantize, dense_state_dict])
def test_decoded_once(make, export, monkeypatch):
    model = quantize(make(), {"*": Int(4)})
    distinct = {id(w): type(w) for _, w in packed_weights(model)}
    calls = []
    for cls in set(distinct.values()):
        decode = cls.decode
        monkeypatch.setattr(cls, "decode", lambda self, decode=decode: calls.append(id(self)) or decode(self))
    export(model)
    assert sorted(calls) == sorted(distinct)


@each_model
def test_float_checkpoint_loads_into_tied_weights(make):
    model, other = quantize(make(), {"*": Int(4)}), make()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(ids), quantize(other, {"*": Int(4)})(ids))


@pytest.mark.parametrize("name", ["embed", "head", "embed.weight", "head.weight", "type:Linear", "type:Embedding"])
def test_any_of_the_names_selects_it(name):
    model = quantize(TiedHead(), {name: Int(4)})
    assert isinstance(model.embed._modules["weight"], PackedWeight)
    assert model.embed._modules["weight"] is model.head._modules["weight"]


def test_tied_and_moved_together(tmp_path):
    model = quantize(TiedHead(), {"*": PQ(2, 8)}).bfloat16()
    assert model.head.weight.dtype == model.embed.weight.dtype == torch.bfloat16
    assert torch.equal(model.head.weight, model.embed.weight)
    with pytest.raises(ValueError, match="selects no weight"):
        quantize(model, "int8")
