"""Stages on models of the usual shapes, written out by hand."""

from itertools import pairwise

import pytest
import torch
from models import TiedByName
from torch import nn

from lightning_qnoise import PQ, Int
from lightning_qnoise.policy import resolve
from lightning_qnoise.stages import check_stages, plan_stages
from lightning_qnoise.weights import list_weights


class Encoder(nn.Module):
    """A Transformer with a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embed.weight


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(16, 16))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(16)
        self.self_attn = SelfAttention()
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)


class Gpt(nn.Module):
    """Embeddings of tokens and places, blocks of plain Linear layers, and a head of its own."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)


def mlp(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def plan(model, stages, policy=None):
    return plan_stages(model, resolve(model, policy or {"*": Int(8)}), stages)


def test_a_transformer_encoder():
    layers = [f"encoder.layers.{i}" for i in range(2)]
    assert plan(Encoder(), "transformer") == [
        [f"{layer}.{name}.weight" for layer in layers for name in ("linear1", "linear2")],
        ["embed.weight"],
        [f"{layer}.self_attn.{name}" for layer in layers for name in ("in_proj_weight", "out_proj.weight")],
    ]


def test_a_decoder_with_attention_of_linear_layers():
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert plan(Gpt(), "transformer") == [
        [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("fc1", "fc2")],
        ["wte.weight", "wpe.weight", "head.weight"],  # the head has the shape of the table
        [f"blocks.{i}.self_attn.{name}.weight" for i in range(2) for name in projections],
    ]


def test_attention_by_its_class():
    model = nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "out": nn.Linear(8, 8)})
    mixed = [f"mix.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
    assert plan(model, "transformer") == [["out.weight"], mixed]


@pytest.mark.parametrize("name", ["SelfAttention", "attention", "crossattn", "Attn"])
def test_attention_by_its_name(name):
    model = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(8, 8)}), "out": nn.Linear(8, 8)})
    assert plan(model, "transformer") == [["out.weight"], [f"{name}.q.weight"]]


def test_a_table_shared_with_the_head_by_name():
    assert plan(TiedByName(), "transformer") == [["embed.weight"]]


def test_empty_stages_of_a_preset_are_left_out():
    assert plan(mlp(8, 8, 4), "transformer") == [["0.weight", "1.weight"]]
    assert plan(mlp(8, 8), "bottom-up") == [["0.weight"]]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 8, 8, 8), [[0], [1], [2]]),
        ((8,) * 10, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ((8, 8, 8), [[0], [1]]),
        ((8, 80, 8, 8, 8), [[0], [1], [2, 3]]),
    ],
)
def test_bottom_up_on_layers_of_known_size(sizes, expected):
    assert plan(mlp(*sizes), "bottom-up") == [[f"{i}.weight" for i in stage] for stage in expected]


def test_bottom_up_on_a_convolutional_net():
    channels = [3, 16, 16, 16, 24, 24, 24, 32, 32, 32]
    model = nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in pairwise(channels)), nn.Linear(32, 4))
    stages = plan(model, "bottom-up", {"*": PQ(1, 4)})
    weights = {weight.name: weight.nbytes for weight in list_weights(model) if weight.is_layer_weight}
    assert len(stages) == 3
    assert [name for stage in stages for name in stage] == list(weights)  # runs, from the input on
    total, largest = sum(weights.values()), max(weights.values())
    for stage in stages:
        assert abs(sum(weights[name] for name in stage) - total / 3) <= largest


@pytest.mark.parametrize("model", [Encoder(), Gpt(), mlp(8, 8, 8)], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("preset", ["joint", "transformer", "bottom-up"])
def test_presets_take_every_weight_of_the_policy_once(model, preset):
    schemes = resolve(model, {"*": Int(8)})
    names = [name for stage in plan_stages(model, schemes, preset) for name in stage]
    assert sorted(names) == sorted(schemes)
    assert preset != "joint" or names == list(schemes)


def test_joint_is_one_stage_of_what_the_policy_selects():
    assert plan(mlp(8, 8, 8, 8), "joint", {"1": None, "*": Int(4)}) == [["0.weight", "2.weight"]]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["*self_attn*", "*"], 3),
        (["*self_attn*", ["*fc1", "*fc2"], "type:Embedding", "head"], 4),
        ((("type:Embedding", "head"), "*"), 2),
    ],
)
def test_globs_of_the_user_take_what_earlier_stages_have_left(stages, expected):
    schemes = resolve(Gpt(), {"*": Int(8)})
    got = plan_stages(Gpt(), schemes, stages)
    attention = [name for name in schemes if "self_attn" in name]
    tables = [name for name in schemes if name.startswith(("w", "head"))]
    feed = [name for name in schemes if ".fc" in name]
    rest = [name for name in schemes if name not in attention]
    assert got == {2: [tables, [n for n in schemes if n not in tables]], 3: [attention, rest]}.get(
        expected, [attention, feed, ["wte.weight", "wpe.weight"], ["head.weight"]]
    )


def test_a_tied_weight_is_found_under_any_of_its_names():
    assert plan(Encoder(), ["head", "*"])[0] == ["embed.weight"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["*fc*", "atention*", "*"], r"stage 2: 'atention\*' .*matches no layer or parameter; close names are '"),
        (["blocks.0", "*"], r"stage 1: 'blocks\.0' .*a glob is no prefix, did you mean 'blocks\.0\.\*'\?"),
        (["*", ["wte", "nothing"]], r"stage 2: 'nothing' .*matches no layer or parameter"),
        (["type:Conv2d", "*"], r"stage 1: 'type:Conv2d' .*layer classes are .*Embedding.*Linear"),
        (["*ln", "*"], r"stage 1: '\*ln' .*matches no layer or parameter"),  # the policy leaves norms alone
        (["*", "wte"], r"stage 2 \['wte'\] matches only weights that belong to an earlier stage"),
        (["*fc*", ["*fc1", "*fc2"], "*"], r"stage 2 \['\*fc1', '\*fc2'\] matches only weights .* an earlier stage"),
        (["*attn*", "w?e"], r"no stage quantizes blocks\.0\.fc1\.weight, .*head\.weight; add them .* a last one '\*'"),
        (
            "transfomer",
            "unknown stages 'transfomer'; choose from joint, transformer, bottom-up, or pass a list of globs",
        ),
        ([], "stages holds no stage; None packs in one shot"),
    ],
)
def test_stages_that_do_not_fit_are_refused_in_words(stages, message):
    with pytest.raises(ValueError, match=message):
        plan(Gpt(), stages)


@pytest.mark.parametrize("stages", [3, None, {"a": "b"}, {"a"}, [3], ["a", []], [["a", 3]], [None], b"joint"], ids=repr)
def test_what_is_no_stages_at_all_is_a_type_error(stages):
    with pytest.raises(TypeError, match=r"stages are a preset's name or a list of globs \(or of lists of them\), got "):
        check_stages(stages)


@pytest.mark.parametrize("stages", ["joint", "transformer", "bottom-up", ["*"], ("a", ("b", "c"))], ids=repr)
def test_what_can_be_meant_passes(stages):
    assert check_stages(stages) is None


def test_planning_changes_nothing():
    model = Gpt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, "transformer")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
