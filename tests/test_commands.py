"""The tools for files, against the model's own functions and plain torch."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_qnoise import PQ, Int, load, quantize, save, size_table
from lightning_qnoise.cli import main
from lightning_qnoise.commands import dequantize_file, file_size, quantize_file, shipped_config
from lightning_qnoise.convert import dense_state_dict
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import to_json


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight


POLICY = {"embed": PQ(block_size=4, n_centroids=16)}


def checkpoint(model, path):
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return path


@pytest.mark.parametrize("scheme", [Int(4, rounding="gptq"), Int(8, activation=Int(8, mode="static"))])
def test_a_scheme_that_needs_data_is_refused(tmp_path, scheme):
    torch.save({"state_dict": nn.Linear(8, 8).state_dict()}, tmp_path / "m.ckpt")
    (tmp_path / "policy.json").write_text(to_json({"weight": scheme}))
    with pytest.raises(ValueError, match=r"'weight'.*needs data"):
        quantize_file(tmp_path / "m.ckpt", tmp_path / "m.safetensors", str(tmp_path / "policy.json"))
    assert not (tmp_path / "m.safetensors").exists()


def test_a_dynamic_activation_goes_into_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.ckpt")
    quantize_file(tmp_path / "m.ckpt", tmp_path / "m.safetensors", "ipq+int8")
    loaded = load(nn.Sequential(nn.Linear(64, 64)), tmp_path / "m.safetensors")
    assert loaded[0].packed("weight").scheme.activation == Int(8)


def test_any_name_of_a_file_will_do(tmp_path):
    torch.save({"state_dict": nn.Sequential(nn.Linear(64, 64)).state_dict()}, tmp_path / "m.ckpt")
    table = quantize_file(tmp_path / "m.ckpt", tmp_path / "m.packed", "int8")
    assert table.bytes == size_table(load(nn.Sequential(nn.Linear(64, 64)), tmp_path / "m.packed")).bytes


@pytest.mark.parametrize("wrap", [nn.Identity, nn.Sequential])
def test_what_enters_attention_is_quantized_too(tmp_path, wrap):
    def make():
        attention = nn.MultiheadAttention(64, 4)
        return attention if wrap is nn.Identity else nn.Sequential(attention)

    torch.save({"state_dict": make().state_dict()}, tmp_path / "a.ckpt")
    quantize_file(tmp_path / "a.ckpt", tmp_path / "a.safetensors", "ipq+int8")
    loaded = load(make(), tmp_path / "a.safetensors")
    assert [weight.scheme.activation for _, weight in packed_weights(loaded)] == [Int(8), Int(8)]


def test_a_file_for_attention_with_a_forward_of_its_own_is_refused_where_it_is_loaded(tmp_path):
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.Sequential(Own(64, 4))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    quantize_file(tmp_path / "a.ckpt", tmp_path / "a.safetensors", "ipq+int8")
    with pytest.raises(ValueError, match=r"layer '0.in_proj_weight': .* write a file again by such a policy"):
        load(model, tmp_path / "a.safetensors")
    assert type(model[0]) is Own
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    quantize_file(tmp_path / "a.ckpt", tmp_path / "b.safetensors", "ipq")
    assert load(model, tmp_path / "b.safetensors")[0](torch.randn(2, 3, 64)).shape == (2, 3, 64)


def test_quantize_file_equals_quantize_and_save(tmp_path):
    model = Tied()
    (tmp_path / "policy.json").write_text(json.dumps({"embed": POLICY["embed"].to_dict()}))
    source = checkpoint(model, tmp_path / "a.ckpt")
    table = quantize_file(source, tmp_path / "b.safetensors", str(tmp_path / "policy.json"))
    expected = quantize(model, POLICY)
    loaded = load(Tied(), tmp_path / "b.safetensors")
    assert loaded.head._modules["weight"] is loaded.embed._modules["weight"]
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert table.bytes == size_table(expected).bytes == file_size(tmp_path / "b.safetensors").bytes


def test_dequantize_file_is_a_checkpoint_of_the_decoded_weights(tmp_path):
    model = quantize(Tied(), POLICY)
    save(model, tmp_path / "a.safetensors")
    dequantize_file(tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    state = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    expected = dense_state_dict(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    Tied().load_state_dict(state)


def test_file_size_counts_tied_tensors_once(tmp_path):
    model = Tied()
    size = file_size(checkpoint(model, tmp_path / "a.ckpt"))
    assert size.bytes == size_table(model).bytes == 64 * 32 * 4 + 4 * 32 * 4 + 8


def test_file_size_of_a_foreign_safetensors_file(tmp_path):
    save_file({"a": torch.zeros(3, 5)}, tmp_path / "a.safetensors")
    assert file_size(tmp_path / "a.safetensors").bytes == 60


def test_size_command_prints_layers_and_total(tmp_path, capsys):
    save(quantize(Tied(), POLICY), tmp_path / "a.safetensors")
    main(["size", str(tmp_path / "a.safetensors")])
    printed = capsys.readouterr().out
    assert "embed" in printed and "PQ(block_size=4, n_centroids=16)" in printed
    assert f"{size_table(quantize(Tied(), POLICY)).bytes:,}" in printed.splitlines()[-1]


def test_quantize_and_dequantize_commands(tmp_path, capsys):
    source = checkpoint(nn.Sequential(nn.Linear(64, 32)), tmp_path / "a.ckpt")
    main(["quantize", str(source), str(tmp_path / "b.safetensors"), "--policy", "int4"])
    main(["dequantize", str(tmp_path / "b.safetensors"), str(tmp_path / "c.ckpt")])
    weight = torch.load(source, weights_only=True)["state_dict"]["0.weight"]
    decoded = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]["0.weight"]
    assert torch.equal(decoded, Int(bits=4).fake_quantize(weight))
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_bytes(b"nonsense"), "no checkpoint of plain tensors"),
        (lambda path: torch.save({"state_dict": {"a": 1}}, path), "no state dict of tensors"),
    ],
)
def test_bad_files_exit_with_one_line(tmp_path, write, message):
    path = tmp_path / "a.ckpt"
    write(path)
    with pytest.raises(SystemExit, match=message):
        main(["size", str(path)])


def test_truncated_and_newer_packed_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save(quantize(Tied(), POLICY), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated"):
        file_size(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(ValueError, match="version 9"):
        file_size(path)


def test_quantize_file_refuses_what_is_packed_and_what_is_not_finite(tmp_path):
    save(quantize(Tied(), POLICY), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="packed already"):
        quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "int8")
    model = Tied()
    model.embed.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"embed\.weight.*NaN"):
        quantize_file(checkpoint(model, tmp_path / "c.ckpt"), tmp_path / "b.safetensors", "int8")
    assert not (tmp_path / "b.safetensors").exists()


def test_shipped_configs(capsys):
    main(["config", "digits"])
    assert capsys.readouterr().out.strip() == shipped_config("digits").strip()
    with pytest.raises(SystemExit, match="choose from digits, text"):
        main(["config", "nothing"])
