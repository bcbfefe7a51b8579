import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_qnoise import PQ, Int, contents, dequantize, load, quantize, save, size_table
from lightning_qnoise.layers import packed_weights


class Net(nn.Module):
    """Convolution, batch norm with its int64 counter, a tied table, attention, buffers."""

    def __init__(self, width=16, tied=True):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.embed, self.head = nn.Embedding(40, width), nn.Linear(width, 40)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.ones(width), persistent=False)

    def forward(self, ids):
        x = self.embed(ids) * self.cache
        x = self.norm(self.stem(x[:, None]).mean(dim=2)[..., None])[..., 0].transpose(1, 2)
        x = x.transpose(1, 2)[..., : self.cache.numel()]
        return self.head(self.attention(x, x, x)[0] + self.steps)


POLICIES = {
    "int": {"*": Int(4)},
    "pq": {"stem": PQ(9, 5), "*": PQ(4, 20)},
    "mixed": {"stem": Int(3, "tensor", symmetric=True), "embed": None, "*": PQ(8, 12, "float32")},
    "float": None,
}
ids = torch.arange(32).view(2, 16)


def build(policy="pq", **options):
    model = Net(**options)
    model(ids)  # moves the batch statistics
    return quantize(model, POLICIES[policy]).eval() if POLICIES[policy] else model.eval()


def snapshot(model):
    state = model.state_dict(keep_vars=True)
    return [(k, id(v), v.detach().clone(), type(model)) for k, v in state.items()] + [type(m) for m in model.modules()]


def assert_refused(path, match, make=Net, error=ValueError):
    """Loading raises, and the model is bit-identical afterwards."""
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load(model, path)
    for old, new in zip(before, snapshot(model), strict=True):
        assert old == new if isinstance(old, type) else old[:2] == new[:2] and torch.equal(old[2], new[2])


def parts(path):
    """Length of the header, the header, and the data of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, change=lambda tensors, metadata: None, checksum=True):
    """Change a file; a fresh checksum lets the change itself be seen."""
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    if checksum and "crc32" in metadata:
        metadata["crc32"] = contents._crc32(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("policy", POLICIES)
def test_round_trip_is_bit_equal(policy, tmp_path):
    model, path = build(policy), tmp_path / "model.safetensors"
    save(model, path)
    with torch.device("meta"):
        meta = Net()
    meta.cache = torch.ones(16)  # not in the file
    for skeleton in (Net(), meta, Net().bfloat16().float()):
        loaded = load(skeleton, path)
        assert loaded is skeleton
        state, expected = loaded.state_dict(), model.state_dict()
        assert list(state) == list(expected)
        for key, value in state.items():
            assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
        assert torch.equal(loaded.eval()(ids), model(ids))
        assert loaded.norm.num_batches_tracked.dtype == torch.int64 and loaded.norm.num_batches_tracked == 1
        assert [(n, w.scheme) for n, w in packed_weights(loaded)] == [(n, w.scheme) for n, w in packed_weights(model)]
        assert loaded.head.weight is loaded.embed.weight or policy in ("int", "pq")  # packed: see layers/test_tied.py
    save(loaded, tmp_path / "again")
    assert parts(tmp_path / "again")[1:] == parts(path)[1:]


@pytest.mark.parametrize("policy", POLICIES)
def test_file_size_is_the_table_and_the_prediction(policy, tmp_path):
    path = tmp_path / "model.safetensors"
    with torch.device("meta"):
        predicted = size_table(Net(), POLICIES[policy])
    model = build(policy)
    written = save(model, path)
    length = parts(path)[0]
    assert path.stat().st_size - 8 - length == written == size_table(model).bytes == predicted.bytes
    assert [(e.name, e.bytes) for e in size_table(model).entries] == [
        (e.name, e.bytes) for e in predicted.entries
    ] or policy != "float"


def test_codes_are_exact_bits_and_nothing_else_is_hidden(tmp_path):
    save(build("pq"), tmp_path / "m")
    _, header, data = parts(tmp_path / "m")
    assert header["stem.weight.codes"] == {
        "dtype": "U8",
        "shape": [6],
        "data_offsets": header["stem.weight.codes"]["data_offsets"],
    }
    assert header["embed.weight.codes"]["shape"] == [100]  # 160 blocks of 5 bits
    assert header["embed.weight.codebook"] | {"data_offsets": 0} == {
        "dtype": "F16",
        "shape": [20, 4],
        "data_offsets": 0,
    }
    assert not any(name.startswith("head.weight") for name in header)
    metadata = header["__metadata__"]
    assert metadata["format"] == "lightning_qnoise" and metadata["version"] == "1"
    assert json.loads(metadata["tied"]) == {"head.weight": "embed.weight"}
    assert json.loads(metadata["policy"])["stem.weight"] == PQ(9, 5).to_dict() | {
        "shape": [16, 1, 3, 3],
        "dtype": "float32",
    }
    assert b"pickle" not in data and max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__") == len(
        data
    )


def test_low_precision_skeleton_decides_what_is_decoded(tmp_path):
    model = build("pq")
    save(model, tmp_path / "m")
    half = load(Net().bfloat16(), tmp_path / "m").eval()
    assert half.embed.weight.dtype == half.stem.bias.dtype == torch.bfloat16
    assert torch.equal(half.embed.weight, model.embed.weight.bfloat16())
    assert torch.equal(half.embed._modules["weight"].codebook, model.embed._modules["weight"].codebook)
    save(build("float").bfloat16(), tmp_path / "half")
    assert load(Net(), tmp_path / "half").stem.weight.dtype == torch.float32


@pytest.mark.parametrize("where", [0, 4, 8, 20, 0.3, 0.5, 0.9, -1])
def test_truncated_files_are_refused(where, tmp_path):
    path = tmp_path / "m"
    save(build(), path)
    data = path.read_bytes()
    path.write_bytes(data[: where if isinstance(where, int) else int(len(data) * where)])
    assert_refused(path, r"m': truncated or no safetensors file")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02}q\x00." * 100, bytes(1000), b"\xff" * 1000, b'{"*": 1}'])
def test_other_files_are_refused(data, tmp_path):
    (tmp_path / "m").write_bytes(data)
    assert_refused(tmp_path / "m", r"m': truncated or no safetensors file")


def test_pickles_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save(Trap(), tmp_path / "m")
    assert_refused(tmp_path / "m", "no safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_missing_files_and_folders(tmp_path):
    assert_refused(tmp_path / "m", "there is no file", error=FileNotFoundError)
    assert_refused(tmp_path, "there is no file", error=FileNotFoundError)
    with pytest.raises(OSError, match=r"cannot write .*nowhere/m"):
        save(build(), tmp_path / "nowhere" / "m")


def set_policy(**fields):
    def change(tensors, metadata):
        policy = json.loads(metadata["policy"])
        policy["stem.weight"] |= fields
        metadata["policy"] = json.dumps(policy)

    return change


CHANGES = {
    "foreign": (lambda t, m: m.clear(), "not one that lightning_qnoise wrote"),
    "newer": (lambda t, m: m.update(version="2"), "format version 2, this lightning_qnoise reads up to 1; upgrade it"),
    "no version": (lambda t, m: m.pop("version"), "format version unknown"),
    "no policy": (lambda t, m: m.pop("policy"), "damaged, its metadata cannot be read"),
    "no ties": (lambda t, m: m.pop("tied"), "damaged, its metadata cannot be read"),
    "bad json": (lambda t, m: m.update(policy="{"), "damaged, its metadata cannot be read"),
    "list": (lambda t, m: m.update(policy="[1]"), "damaged, its metadata cannot be read"),
    "bad ties": (lambda t, m: m.update(tied="[1]"), "damaged, its metadata cannot be read"),
    "scheme": (set_policy(scheme="Ternary"), "unknown scheme 'Ternary'"),
    "field": (set_policy(blocksize=3), "PQ: .*blocksize"),
    "value": (set_policy(n_centroids=1), "PQ expects n_centroids"),
    "dtype": (set_policy(dtype="load"), "damaged, its metadata cannot be read"),
    "other shape": (set_policy(shape=[8, 1, 3, 3]), r"damaged: tensor stem\.weight\.codes does not fit"),
    "uncuttable": (set_policy(shape=[16, 1, 3, 2]), "cannot cut rows of 6"),
    "codes gone": (lambda t, m: t.pop("stem.weight.codes"), r"damaged: tensor stem\.weight\.codes does not fit"),
    "codes short": (
        lambda t, m: t.update({"stem.weight.codes": t["stem.weight.codes"][:-1].clone()}),
        "damaged: tensor stem",
    ),
    "codebook": (
        lambda t, m: t.update({"stem.weight.codebook": t["stem.weight.codebook"].float()}),
        "damaged: tensor stem",
    ),
    "missing": (lambda t, m: t.pop("stem.bias"), r"'stem\.bias' is in the model, not in the file"),
    "extra": (lambda t, m: t.update(more=torch.ones(2)), "'more' is in the file, not in the model"),
    "shape": (
        lambda t, m: t.update({"stem.bias": torch.ones(3)}),
        r"'stem\.bias' is float \[3\] in the file, float \[16\]",
    ),
    "kind": (
        lambda t, m: t.update(steps=torch.ones(())),
        r"'steps' is float \[\] in the file, torch\.int64 \[\] in the model",
    ),
    "tie": (lambda t, m: m.update(tied="{}"), r"'head\.weight' is tied to 'embed\.weight' in the model only"),
    "tie more": (
        lambda t, m: m.update(tied='{"head.weight": "embed.weight", "head.bias": "embed.weight"}'),
        r"'head\.bias' is tied to 'embed\.weight' in the file only",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named(change, tmp_path):
    save(build(), tmp_path / "m")
    rewrite(tmp_path / "m", CHANGES[change][0])
    assert_refused(tmp_path / "m", CHANGES[change][1])


@pytest.mark.parametrize("tensor", ["embed.weight.codes", "stem.weight.codebook", "stem.bias", "steps"])
def test_every_damaged_byte_is_noticed(tensor, tmp_path):
    path = tmp_path / "m"
    save(build(), path)
    length, header, _ = parts(path)
    data = bytearray(path.read_bytes())
    data[8 + length + header[tensor]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    assert_refused(path, "damaged, its tensors are not the ones that were written")


def test_swapped_tensors_are_noticed(tmp_path):
    save(build(), tmp_path / "m")

    def swap(tensors, metadata):
        tensors["norm.weight"], tensors["norm.running_mean"] = tensors["norm.running_mean"], tensors["norm.weight"]

    rewrite(tmp_path / "m", swap, checksum=False)
    assert_refused(tmp_path / "m", "damaged")


def test_models_that_do_not_fit(tmp_path):
    save(build(), tmp_path / "m")
    assert_refused(
        tmp_path / "m", r"'norm\.bias' is float \[16\] in the file, float \[8\] in the model", lambda: Net(8)
    )
    assert_refused(tmp_path / "m", r"'head\.weight' is in the model, not in the file", lambda: Net(tied=False))
    assert_refused(tmp_path / "m", "already packed: load into a freshly built one", build)
    assert_refused(tmp_path / "m", "is in the file, not in the model", lambda: nn.Linear(3, 3))
    save(build(tied=False), tmp_path / "untied")
    assert_refused(tmp_path / "untied", r"'head\.weight' is tied to 'embed\.weight' in the model only")
    assert torch.isfinite(load(dequantize(build()), tmp_path / "m")(ids)).all()


def test_buffers_on_meta_that_no_file_holds_are_refused(tmp_path):
    save(build(), tmp_path / "m")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="'cache' is a buffer on meta that no file holds; build the model on a real"):
        load(model, tmp_path / "m")
    assert all(p.is_meta for p in model.parameters()) and not list(packed_weights(model))


@pytest.mark.parametrize("target", ["os.replace", "lightning_qnoise.contents.save_file", "os.fsync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_file(target, error, tmp_path, monkeypatch):
    path = tmp_path / "m"
    save(build(), path)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        if target.endswith("save_file"):
            args[1].write_bytes(b"half a fi")
        raise error

    monkeypatch.setattr(target, fail)
    with pytest.raises(error):
        save(build("int"), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["m"]
    with pytest.raises(error):
        save(build(), tmp_path / "new")
    assert os.listdir(tmp_path) == ["m"]


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"count": 3}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(Counting(8, 8))
    with pytest.raises(ValueError, match=r"'0\._extra_state' in the state dict is a dict, only tensors"):
        save(model, tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_views_aliases_and_odd_tensors_are_stored(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(4, 6)
            self.weight = nn.Parameter(whole.T)  # not contiguous
            for name, value in {
                "alias": whole,  # the same memory
                "part": torch.randn(100)[10:13],
                "expanded": torch.randn(1).expand(5),
                "empty": torch.empty(0, 3),
                "empty2": torch.empty(0),
                "flag": torch.tensor([True, False]),
                "scalar": torch.tensor(2.5, dtype=torch.float64),
                "float16": torch.randn(3).half(),
                "complex": torch.randn(3, dtype=torch.complex64),
            }.items():
                self.register_buffer(name, value)

    model, path = Odd(), tmp_path / "m"
    written = save(model, path)
    assert written == size_table(model).bytes == len(parts(path)[2])
    with torch.device("meta"):
        skeleton = Odd()
    loaded = load(skeleton, path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and loaded.state_dict()[name].dtype == value.dtype


def test_channels_last_and_frozen_skeletons(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    save(model, tmp_path / "m")
    skeleton = nn.Sequential(nn.Conv2d(4, 8, 3)).requires_grad_(False)
    assert torch.equal(load(skeleton, tmp_path / "m")[0].weight, model[0].weight)
    assert not skeleton[0].weight.requires_grad


def test_unused_names_in_a_different_order_do_not_matter(tmp_path):
    save(build(), tmp_path / "m")
    expected = load(Net(), tmp_path / "m").eval()(ids)
    rewrite(tmp_path / "m", lambda tensors, metadata: tensors.update(dict(reversed(list(tensors.items())))))
    assert torch.equal(load(Net(), tmp_path / "m").eval()(ids), expected)


def test_float_checkpoint_of_the_loaded_model(tmp_path):
    """A packed file can be trained on: dequantize gives a float model of the original keys."""
    save(build(), tmp_path / "m")
    model = dequantize(load(Net(), tmp_path / "m"))
    assert list(model.state_dict()) == list(Net().state_dict())
    model(ids).sum().backward()
    assert model.embed.weight.grad is not None and model.head.weight is model.embed.weight


def test_meta_models_have_nothing_to_save(tmp_path):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(NotImplementedError, match="meta"):
        save(model, tmp_path / "m")
    assert not os.listdir(tmp_path)
