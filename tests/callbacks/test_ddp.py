"""Two processes on the CPU: what must differ between ranks differs, and what must be equal is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import PQS, equal, net

from lightning_qnoise import PQ, load, quantize
from lightning_qnoise.callbacks.fit import from_rank_zero

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["ddp", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """What the two ranks and the process that started them have seen."""
    folder = tmp_path_factory.mktemp(request.param)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "two_ranks.py"), request.param]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
    return request.param, ranks, torch.load(folder / "main.pt"), folder


def test_two_ranks(run):
    strategy, (zero, one), main, folder = run
    assert len(zero["masks"]) == len(one["masks"]) == 8
    assert not any(torch.equal(a, b) for a, b in zip(zero["masks"], one["masks"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(zero["codebooks"], one["codebooks"], strict=True))
    assert equal(zero["float"], one["float"])
    assert not equal(zero["float"], net())
    assert equal(zero["packed"], one["packed"])
    assert (zero["saves"], one["saves"]) == (1, 0)
    assert zero["metrics"]["size/compression"] == one["metrics"]["size/compression"] > 4
    assert "quantized/val_loss" in zero["metrics"]

    by_hand = net()
    by_hand.load_state_dict(zero["float"])
    quantize(by_hand, PQS)
    assert equal(by_hand, zero["packed"])
    loaded = load(net(), folder / "quantized.safetensors")
    assert equal(loaded, by_hand)
    if strategy == "ddp":
        assert main["layer"] == "PackedLinear"
        assert equal(by_hand, main["state"])
    else:  # the process that spawned the ranks keeps its float model, with the decoded weights
        assert main["layer"] == "Linear"
        assert torch.equal(main["state"]["fc.weight"], by_hand.fc.weight)
        assert list(main["state"]) == list(net().state_dict())


class Ranks:
    """Stands in for a trainer on one of two ranks; what rank 0 broadcasts is kept."""

    world_size = 2

    def __init__(self, rank, sent=None):
        self.is_global_zero = rank == 0
        self.strategy, self.sent = self, sent

    def broadcast(self, obj, src):
        self.sent = obj if self.is_global_zero else self.sent
        return self.sent


def test_rank_zero_decides_and_its_errors_reach_every_rank():
    weight = torch.randn(8, 16)
    scheme = PQ(8, 4)
    like = {"w": (scheme, weight)}
    zero = Ranks(0)
    sent = from_rank_zero(zero, lambda: {"w": scheme.encode(weight)}, like)
    got = from_rank_zero(Ranks(1, zero.sent), lambda: pytest.fail("only rank 0 encodes"), like)
    assert equal(sent["w"], got["w"])

    def overflow():
        raise ValueError("weights overflow")

    with pytest.raises(ValueError, match="weights overflow"):
        from_rank_zero(zero, overflow, like)
    with pytest.raises(ValueError, match="weights overflow"):
        from_rank_zero(Ranks(1, zero.sent), overflow, like)
