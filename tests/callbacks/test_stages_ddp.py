"""Stages on two processes, under DDP and FSDP2: both hold the same codes, those of one process on joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import equal

from lightning_qnoise.contents import read

HERE = Path(__file__).parent


def run(script, folder):
    """Run a script on two processes and on one, each in a folder of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "PYTHONWARNINGS": "ignore"}
    for devices in ("2", "1"):
        (folder / devices).mkdir()
        command = [sys.executable, str(HERE / script), devices]
        done = subprocess.run(command, cwd=folder / devices, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two ranks and one process alone have seen."""
    folder = tmp_path_factory.mktemp("ddp")
    run("two_ranks_staged.py", folder)
    return [torch.load(folder / name) for name in ("2/rank0of2.pt", "2/rank1of2.pt", "1/rank0of1.pt")]


@pytest.mark.parametrize("reassign", [True, False])
def test_two_ranks_and_one(seen, reassign):
    zero, one, alone = (rank[reassign] for rank in seen)
    assert equal(zero["held"], one["held"])
    assert equal(zero["packed"], one["packed"])
    assert zero["names"] == one["names"] == alone["names"] == ["float", "stage 1", "stage 2", "packed"]
    assert zero["metrics"] == one["metrics"] == alone["metrics"]
    for name, value in alone["held"].items():
        assert zero["held"][name] == pytest.approx(value, abs=1e-5), name
    for name, value in alone["packed"].items():
        if name.endswith("codes"):
            assert torch.equal(zero["packed"][name], value)
        else:
            assert zero["packed"][name].float() == pytest.approx(value.float(), abs=1e-3), name
    assert not equal(alone["packed"], seen[2][not reassign]["packed"])


def test_a_resumed_fit_on_two_ranks(seen):
    for rank in seen[:2]:
        assert equal(rank["resumed"]["packed"], rank[True]["packed"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder of fits under FSDP2 (`2`) and on one process (`1`)."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        pytest.skip("FSDP2 of torch 2.6 does not run on CPUs")
    folder = tmp_path_factory.mktemp("fsdp")
    run("two_ranks_fsdp.py", folder)
    return folder


@pytest.mark.parametrize("reassign", [True, False])
def test_two_sharded_ranks_and_one(sharded, reassign):
    ours, alone = (read(sharded / devices / f"{reassign}.safetensors") for devices in "21")
    assert ours.packed == alone.packed
    assert ours.tensors.keys() == alone.tensors.keys()
    for name, value in alone.tensors.items():
        if value.dtype == torch.uint8:
            assert torch.equal(ours.tensors[name], value), name
        else:
            torch.testing.assert_close(ours.tensors[name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize("reassign", [True, False])
def test_a_sharded_model_keeps_the_decoded_weights(sharded, reassign):
    zero, one = (torch.load(sharded / "2" / f"{reassign}-{rank}.pt") for rank in (0, 1))
    assert equal(zero, one)
    written = read(sharded / "2" / f"{reassign}.safetensors")
    for name in written.packed:
        assert torch.equal(zero[name], written.rebuild(name).decode()), name
