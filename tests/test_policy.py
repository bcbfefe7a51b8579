import json
import re
import warnings
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lightning_qnoise import PQ, Int
from lightning_qnoise.policy import as_mapping, decide, from_json, resolve, to_json
from lightning_qnoise.presets import PRESETS
from lightning_qnoise.schemes import Scheme
from lightning_qnoise.weights import list_weights


class Net(nn.Module):
    """A bit of everything that has a weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.stem = nn.ModuleDict(
            {"conv": nn.Conv2d(32, 64, 3), "point": nn.Conv2d(32, 64, 1), "norm": nn.BatchNorm2d(64)}
        )
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(64, 2, 128) for _ in range(2))
        self.encoder2 = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50)
        self.table = nn.Parameter(torch.randn(64, 64))


WEIGHTS = {
    *("embed.weight", "stem.conv.weight", "stem.point.weight", "encoder2.weight", "head.weight"),
    *(f"encoder.{i}.{n}" for i in (0, 1) for n in ("self_attn.in_proj_weight", "self_attn.out_proj.weight")),
    *(f"encoder.{i}.{n}" for i in (0, 1) for n in ("linear1.weight", "linear2.weight")),
}
INT, PQ8 = Int(4), PQ(8, 16)


@pytest.mark.parametrize(
    "globs, expected",
    [
        (["head"], {"head.weight"}),
        (["head.weight"], {"head.weight"}),
        (["encoder.*"], {n for n in WEIGHTS if n.startswith("encoder.")}),
        (["encoder.0"], None),
        (["*.self_attn.in_proj_weight"], {n for n in WEIGHTS if "in_proj" in n}),
        (["*.self_attn"], {n for n in WEIGHTS if "in_proj" in n}),
        (["*.linear[12]"], {n for n in WEIGHTS if "linear" in n}),
        (["encoder?"], {"encoder2.weight"}),
        (["type:Conv2d"], {"stem.conv.weight", "stem.point.weight"}),
        (["type:Linear"], {n for n in WEIGHTS if re.search(r"linear|head|encoder2|out_proj", n)}),
        (["type:*Attention"], {n for n in WEIGHTS if "in_proj" in n}),
        (["type:_ConvNd"], {"stem.conv.weight", "stem.point.weight"}),
        (["*"], WEIGHTS),
        (["table"], {"table"}),
        (["stem.norm.weight"], None),
        (["ENCODER2"], None),
    ],
)
def test_what_a_glob_selects(globs, expected):
    policy = dict.fromkeys(globs, INT)
    if expected is None:
        with pytest.raises(ValueError):
            resolve(Net(), policy)
    else:
        assert set(resolve(Net(), policy)) == expected


def test_first_match_wins_and_none_keeps_float():
    policy = {
        "encoder.0.*": None,
        "encoder.*": INT,
        "*.self_attn.*": PQ8,
        "head": "int8",
        "embed": None,
        "type:Linear": PQ8,
    }
    schemes = resolve(Net(), policy)
    assert not any(n.startswith(("encoder.0.", "embed", "stem")) for n in schemes)
    assert {n for n, s in schemes.items() if s == INT} == {n for n in WEIGHTS if n.startswith("encoder.1.")}
    assert schemes["head.weight"] == Int(8) and schemes["encoder2.weight"] == PQ8


@pytest.mark.parametrize("policy", ["int8", "int4", "pq", "ipq", Int(3), PQ(4, 16)])
def test_presets_and_single_schemes_take_all_layer_weights(policy):
    schemes = resolve(Net(), policy)
    assert set(schemes) == WEIGHTS
    if isinstance(policy, Scheme):
        assert set(schemes.values()) == {policy}


def test_presets_in_a_mapping_skip_what_they_cannot_take():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(1, 4), nn.Embedding(500, 8, max_norm=1.0))
    schemes = resolve(model, {"0": Int(4), "*": "ipq"})
    assert schemes == {"0.weight": Int(4)}
    reasons = {d.weight.name: d.reason for d in decide(model, {"0": Int(4), "*": "ipq"})}
    assert "would not shrink" in reasons["1.weight"] and "max_norm" in reasons["2.weight"]
    assert reasons["0.bias"] == "not in the policy"


def test_papers_block_sizes():
    sizes = {name: scheme.block_size for name, scheme in resolve(Net(), "ipq").items()}
    expected = {name: 4 if "attn" in name or "point" in name else 9 if "conv" in name else 8 for name in WEIGHTS}
    assert sizes == expected


@pytest.mark.parametrize(
    "layer, block_size, k",
    [
        (nn.Linear(1024, 1024), 8, 256),
        (nn.Linear(1022, 1022), 7, 256),  # the largest divisor up to 8
        (nn.Linear(1018, 1024), 2, 256),
        (nn.Linear(1021, 1024), 1, 256),
        (nn.Linear(64, 64), 8, 128),  # 512 blocks: a quarter
        (nn.Linear(64, 63), 8, 64),  # 504 blocks: the power of two below a quarter
        (nn.Linear(32, 32), 8, 32),
        (nn.Conv2d(64, 64, 3), 9, 256),
        (nn.Conv2d(64, 64, 5), 8, 256),  # 25 * 64 columns
        (nn.Conv2d(64, 64, 1), 4, 256),
        (nn.Conv2d(64, 256, 3, groups=64), 9, 64),  # depthwise
        (nn.Conv1d(64, 64, 3), 8, 256),
    ],
    ids=str,
)
def test_presets_adapt(layer, block_size, k):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheme = resolve(layer, "ipq")["weight"]
    assert (scheme.block_size, scheme.n_centroids) == (block_size, k)
    n_blocks = layer.weight.numel() // block_size
    assert k <= n_blocks / 4 and layer.weight[0].numel() % block_size == 0


def test_a_layer_too_small_for_a_codebook_becomes_int8():
    assert resolve(nn.Linear(32, 31), "ipq") == {"weight": Int(8)}
    assert resolve(nn.Conv2d(1, 64, 3), "ipq") == {"weight": Int(8)}


def test_what_would_not_shrink_is_left_float():
    tiny = nn.Sequential(nn.Linear(1, 4), nn.Linear(64, 64))  # a scale a row is as large as the row
    assert set(resolve(tiny, "int8")) == set(resolve(tiny, Int(8))) == {"1.weight"}
    assert set(resolve(tiny, {"*": Int(8)})) == {"0.weight", "1.weight"}  # said in full: done
    assert "would not shrink (16 to" in decide(tiny, "int8")[0].reason
    with pytest.raises(ValueError, match=r"policy 'int8' selects no weight.*0\.weight: would not shrink"):
        resolve(nn.Sequential(nn.Linear(1, 4)), "int8")


@pytest.mark.parametrize(
    "policy, message",
    [
        ({"encoder": INT}, r"'encoder' in the policy matches no .*did you mean 'encoder\.\*'\?"),
        ({"encoder.0": INT}, r"did you mean 'encoder\.0\.\*'\?"),
        ({"head": INT, "decodr2": INT}, r"'decodr2' .*matches no layer or parameter; close names are .*'encoder2'"),
        ({"*": INT, "nothing.*": None}, r"'nothing\.\*' in the policy matches no layer"),
        ({"type:Conv3d": INT}, r"'type:Conv3d' .*layer classes are .*Conv2d.*Linear"),
        ({"stem.norm": INT}, r"matches no layer weight, only stem\.norm\.weight, stem\.norm\.bias; name one in full"),
        ({"*.bias": INT}, r"'\*\.bias' in the policy matches no layer weight, only"),
        ({"head.bias": INT}, r"layer 'head\.bias': .*fewer than two dimensions; keep it float"),
        ({"*": None}, r"selects no weight of the model \(.*head\.weight: kept float by the policy"),
        ({}, "selects no weight"),
        (
            {"head": PQ(7, 16)},
            r"layer 'head\.weight': PQ\(block_size=7\) cannot cut rows of 64 .*\[2, 4, 8, .*None in the policy",
        ),
        (
            {"head": Int(4, "group:5")},
            r"layer 'head\.weight': Int\(granularity='group:5'\) .*divisor of 64, or .*'channel'",
        ),
        ("ipq8", "unknown preset 'ipq8'; choose from int8, int4, pq, ipq, ipq.int8, or name a .json file"),
        ({"head": "nf4"}, "unknown preset 'nf4'"),
    ],
)
def test_errors_name_the_entry_and_the_remedy(policy, message):
    with pytest.raises(ValueError, match=message):
        resolve(Net(), policy)


@pytest.mark.parametrize("policy", [3, None, [Int(4)], {"head": 4}, {"head": [INT]}, {3: INT}, torch.nn.Linear, Int])
def test_wrong_types(policy):
    with pytest.raises(TypeError, match="a policy"):
        resolve(Net(), policy)


@pytest.mark.parametrize("policy", [{"*": PQ(8, 256)}, PQ(8, 256)])
def test_reduced_codebooks_warn_exactly_once(policy):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 16))
    with pytest.warns(UserWarning) as caught:
        schemes = resolve(model, policy)
    assert len(caught) == 1
    assert [schemes.get(f"{i}.weight") for i in range(2)] == [PQ(8, 256), PQ(8, 64)]
    text = str(caught[0].message)
    assert (
        "n_centroids is reduced" in text
        and "1.weight: PQ(block_size=8, n_centroids=64)" in text
        and "0.weight" not in text
    )


def integer_linear():
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    return layer


def weighted_container():
    container = nn.Sequential(nn.ReLU())
    container.weight = nn.Parameter(torch.randn(64, 64))
    return container


OBSTACLES = {
    "max_norm": lambda: nn.Embedding(64, 64, max_norm=1.0),
    "max_norm: set": lambda: nn.EmbeddingBag(64, 64, max_norm=1.0),
    "not initialized yet: run one batch": lambda: nn.LazyLinear(8),
    "dtype torch.int8": integer_linear,
    "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations": lambda: weight_norm(nn.Linear(64, 64)),
    "belongs to a container": weighted_container,
    "recomputed in every forward by SpectralNorm": lambda: nn.utils.spectral_norm(nn.Linear(64, 64)),
    "recomputed in every forward by L1Unstructured": lambda: prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5),
    "holds no elements": lambda: nn.Linear(0, 4),
}


@pytest.mark.filterwarnings("ignore:.*(Lazy modules|spectral_norm|zero-element).*")
@pytest.mark.parametrize("message", OBSTACLES)
def test_what_stands_in_the_way_is_named(message):
    model = nn.ModuleDict({"bad": OBSTACLES[message](), "good": nn.Linear(64, 64)})
    for policy in ({"bad": INT}, {"*": INT}, {"good": None, "*": INT}):
        with pytest.raises(ValueError, match=rf"layer 'bad\..*{re.escape(message)}.*None in the policy"):
            resolve(model, policy)
    for policy in ("int8", {"*": "ipq"}, INT, {"bad": None, "good": INT}):
        assert set(resolve(model, policy)) == {"good.weight"}
    assert any(message in d.reason for d in decide(model, "int8"))


def test_types_that_do_not_count_as_obstacles():
    model = nn.ModuleList([nn.Linear(64, 64).double(), nn.Linear(64, 64).half(), nn.Embedding(64, 64, padding_idx=0)])
    assert len(resolve(model, "int8")) == 3


def test_tied_weights_are_one_weight():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
    model["head"].weight = model["embed"].weight
    assert len(list_weights(model)) == 2 and list_weights(model)[0].names == ("embed.weight", "head.weight")
    for name in ("embed", "head", "head.weight", "type:Linear"):
        assert resolve(model, {name: INT}) == {"embed.weight": INT}
    with pytest.raises(ValueError, match="selects no weight"):
        resolve(model, {"head": None, "*": INT})  # under one name float: float


def test_resolve_works_on_weights_and_on_meta():
    with torch.device("meta"):
        meta = Net()
    assert resolve(meta, "ipq") == resolve(Net(), "ipq") == resolve(list_weights(meta), "ipq")


def test_json_round_trip(tmp_path):
    policy = {"head": Int(8), "encoder.*": PQ(8, 16, "float32"), "embed": None, "*": "ipq"}
    assert from_json(to_json(policy)) == policy
    assert list(from_json(to_json(policy))) == list(policy)  # the order decides
    path = tmp_path / "policy.json"
    path.write_text(to_json(policy))
    assert as_mapping(str(path)) == policy
    assert resolve(Net(), str(path)) == resolve(Net(), policy)
    assert json.loads(path.read_text())["head"] == {"scheme": "Int", **asdict(Int(8))}


@pytest.mark.parametrize(
    "text, error, message",
    [
        ('{"*": "ipq8"}', ValueError, "unknown preset 'ipq8'"),
        ('{"*": {"scheme": "Foo"}}', ValueError, "unknown scheme 'Foo'"),
        ('{"*": 4}', TypeError, "a policy maps globs"),
        ('["ipq"]', ValueError, "JSON object"),
        ('{"*": ', ValueError, r"policy\.json' holds no policy: Expecting value"),
    ],
)
def test_json_files_are_checked(text, error, message, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        resolve(Net(), str(path))
    with pytest.raises(FileNotFoundError):
        resolve(Net(), str(tmp_path / "missing.json"))


def test_every_preset_is_a_name_of_a_policy():
    for name in PRESETS:
        assert as_mapping(name) == {"*": name}


def test_a_policy_file_is_as_strict_as_a_mapping(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(to_json({"no_such_layer": Int(8), "0": Int(4)}))
    with pytest.raises(ValueError, match="'no_such_layer' in the policy matches no layer"):
        resolve(nn.Sequential(nn.Linear(64, 64)), str(path))
