"""Schemes with an activation: what may be said of one, and which layers get it."""

import json
import warnings

import pytest
import torch
from torch import nn

from lightning_qnoise import PQ, Int, load, quantize, save
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import as_mapping, from_json, resolve, to_json
from lightning_qnoise.presets import PRESETS
from lightning_qnoise.schemes import Scheme


class Net(nn.Module):
    """A table, convolutions, attention and linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(200, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.attn = nn.MultiheadAttention(64, 2, batch_first=True)
        self.rnn = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, 50)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.head(self.rnn(self.attn(x, x, x)[0])[0])


TAKING = {"conv.weight", "attn.in_proj_weight", "attn.out_proj.weight", "head.weight"}
RECURRENT = {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
IDS = torch.arange(12).view(2, 6)
A8 = Int(8, activation=Int(8))


@pytest.mark.parametrize("policy", [A8, PQ(4, 16, activation=Int(8)), "ipq+int8", {"*": "ipq+int8"}], ids=str)
def test_what_has_no_plain_input_keeps_it_float_with_one_warning(policy):
    with pytest.warns(UserWarning) as caught:
        schemes = resolve(Net(), policy)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert all(name in text for name in RECURRENT)
    assert not any(name in text for name in (*TAKING, "embed"))
    assert set(schemes) == TAKING | RECURRENT | {"embed.weight"}
    assert {name for name, scheme in schemes.items() if scheme.activation} == TAKING


def test_a_table_loses_its_activation_silently():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in (A8, {"*": A8}, "ipq+int8", {"0": A8}):
            schemes = resolve(model, policy)
            assert schemes["0.weight"].activation is None
        bag = resolve(nn.Sequential(nn.EmbeddingBag(50, 16)), {"*": A8})
        assert bag["0.weight"] == Int(8)
    assert resolve(model, {"*": A8}) == {"0.weight": Int(8), "1.weight": A8}


@pytest.mark.parametrize("name", ["rnn.weight_ih_l0", "rnn"])
def test_a_mapping_is_strict_and_names_the_layer(name):
    pattern = r"layer 'rnn\..*': its layer is no plain Linear, convolution or attention.*activation=None"
    with pytest.raises(ValueError, match=pattern):
        resolve(Net(), {name: A8})
    with pytest.raises(ValueError, match="no plain Linear"):
        resolve(Net(), {"*": A8})
    assert set(resolve(Net(), {name: Int(8)})) <= RECURRENT


def test_a_subclass_with_its_own_forward_has_no_plain_input():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Named(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"layer '0\.weight'"):
        resolve(nn.Sequential(Scaled(64, 64)), {"*": A8})
    assert resolve(nn.Sequential(Named(64, 64)), {"*": A8}) == {"0.weight": A8}


def test_tied_to_a_linear_layer_a_table_keeps_the_activation():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
    model["head"].weight = model["embed"].weight
    assert resolve(model, {"*": A8}) == resolve(model, A8) == {"embed.weight": A8}


def test_ipq_int8_is_ipq_with_integers_for_codebooks_and_inputs():
    with pytest.warns(UserWarning, match="stays float"):
        schemes = resolve(Net(), "ipq+int8")
    plain = resolve(Net(), "ipq")
    for name, scheme in schemes.items():
        assert isinstance(scheme, PQ)
        assert (scheme.block_size, scheme.n_centroids) == (plain[name].block_size, plain[name].n_centroids)
        assert scheme.codebook == Int(8, "tensor") and scheme.activation in (None, Int(8))
    assert resolve(nn.Linear(32, 31), "ipq+int8") == {"weight": A8}  # too small for a codebook
    assert "ipq+int8" in PRESETS and as_mapping("ipq+int8") == {"*": "ipq+int8"}
    with pytest.raises(ValueError, match=r"unknown preset 'ipq-int8'; choose from .*ipq\+int8"):
        resolve(Net(), "ipq-int8")


@pytest.mark.filterwarnings("ignore:what enters")
@pytest.mark.parametrize("policy", ["ipq+int8", A8, Int(4, activation=Int(8, mode="static"))], ids=str)
def test_a_model_with_every_kind_of_layer(policy, tmp_path):
    torch.manual_seed(0)
    plain = Net().eval()
    expected = plain(IDS)
    torch.manual_seed(0)
    model = quantize(Net().eval(), policy, loader=[IDS])
    out = model(IDS)
    assert (out - expected).norm() / expected.norm() < 0.6
    assert {name for name, packed in packed_weights(model) if packed.scheme.activation} == TAKING
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(Net().eval(), tmp_path / "m.safetensors")(IDS), out)


NESTED = [
    A8,
    Int(4, "group:16", True, "mse", activation=Int(6, mode="static", range="ema", symmetric=True)),
    Int(4, rounding="gptq", activation=Int(8, per="tensor", range="percentile")),
    PQ(8, 16, codebook=Int(8, "tensor"), activation=Int(8, mode="static", range="histogram")),
    PQ(4, 300, "float32", activation=Int(2, per="token")),
]


@pytest.mark.parametrize("scheme", NESTED, ids=str)
def test_json_round_trip(scheme, tmp_path):
    policy = {"head": scheme, "conv": None, "*": "ipq+int8"}
    text = to_json(policy)
    again = from_json(text)
    assert again == policy and list(again) == list(policy)
    assert isinstance(again["head"].activation, Int)
    assert hash(again["head"]) == hash(scheme)
    path = tmp_path / "policy.json"
    path.write_text(text)
    assert as_mapping(str(path)) == policy
    assert json.loads(text)["head"]["activation"]["bits"] == scheme.activation.bits


def test_json_of_before_activations_is_read():
    assert Scheme.from_dict({"scheme": "Int", "bits": 4, "granularity": "channel", "symmetric": False}) == Int(4)
    old = {"scheme": "PQ", "block_size": 8, "n_centroids": 16, "codebook_dtype": "float16", "n_iter": 20, "seed": 0}
    assert Scheme.from_dict(old) == PQ(8, 16)


@pytest.mark.parametrize(
    "data",
    [
        {"scheme": "Int", "activation": {"bits": 99}},
        {"scheme": "Int", "activation": {"bit": 8}},
        {"scheme": "Int", "activation": {"bits": 8, "mode": "lazy"}},
        {"scheme": "PQ", "codebook": {"bits": 1}},
        {"scheme": "PQ", "activation": {"activation": {"bits": 8}}},
        {"scheme": "Int", "activation": 8},
        {"scheme": "Int", "activation": "int8"},
        {"scheme": "PQ", "codebook": "int8"},
    ],
    ids=json.dumps,
)
def test_json_is_checked_in_depth(data):
    with pytest.raises(ValueError):
        Scheme.from_dict(data)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "lazy"}, "Int expects mode 'dynamic' or 'static', got 'lazy'"),
        ({"per": "row"}, "Int expects per None or 'token' or 'tensor', got 'row'"),
        ({"range": "kl"}, "range must be one of minmax, .*got 'kl'"),
        ({"rounding": "up"}, "Int expects rounding 'nearest' or 'gptq', got 'up'"),
        ({"activation": Int(8, mode="static", per="token")}, "a static activation has one range"),
        ({"activation": Int(8, range="ema")}, "range='ema' averages over batches, which only mode='static' does"),
        ({"activation": Int(8, activation=Int(8))}, "an activation has no activation of its own"),
        ({"activation": Int(8, "tensor")}, "quantized per='tensor' or 'token'"),
        ({"activation": Int(8, "group:4")}, "quantized per='tensor' or 'token'"),
        ({"activation": Int(8, rounding="gptq")}, "to the nearest level"),
    ],
)
@pytest.mark.parametrize("kind", [Int, PQ])
def test_options_are_checked(kind, options, message):
    if kind is PQ and "activation" not in options:
        options = {"activation": options}  # as from JSON
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    "scheme",
    [Int(8, mode="static"), Int(8, per="token"), Int(8, per="tensor"), Int(8, range="ema")],
    ids=["static", "token", "tensor", "ema"],
)
def test_what_is_of_activations_is_refused_for_a_weight(scheme):
    if scheme.range != "ema":
        assert Int(8, activation=scheme).activation == scheme
    for call in (lambda: scheme.encode(torch.randn(4, 4)), lambda: scheme.empty((4, 4)), lambda: scheme.adapt((4, 4))):
        with pytest.raises(ValueError, match="are of activations"):
            call()
    with pytest.raises(ValueError, match=r"layer 'head\.weight': .*are of activations"):
        resolve(Net(), {"head": scheme})


@pytest.mark.parametrize(
    "scheme, parts",
    [
        (Int(4), ["Int(bits=4"]),
        (A8, ["Int(bits=8", "activation=Int(bits=8)"]),
        (PQ(8, 16, codebook=Int(8, "tensor")), ["PQ(block_size=8", "codebook=Int(bits=8)"]),
        (PQ(8, 16, activation=Int(6)), ["activation=Int(bits=6)"]),
    ],
)
def test_the_name_of_a_scheme_tells_what_is_quantized(scheme, parts):
    assert all(part in str(scheme) for part in parts)
    assert "None" not in str(scheme)
