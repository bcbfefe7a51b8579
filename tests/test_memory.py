"""Lean and fast inference: the same values, and what is kept in between."""

import copy

import pytest
import torch
from torch import nn

from lightning_qnoise import PQ, Int, quantize, set_memory

POLICIES = ["int8", "int4", Int(8, activation=Int(8)), PQ(4, 16), PQ(4, 16, codebook=Int(8, "tensor"))]


def model(policy):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 16), nn.Conv1d(8, 12, 3, padding=1), nn.ReLU(), nn.Linear(16, 24))
    return quantize(net, policy).eval()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_same_values_decoded_once(policy):
    lean, ids = model(policy), torch.randint(20, (3, 8))
    fast = set_memory(copy.deepcopy(lean), "fast")
    decoded = []
    for index in (0, 1, 3):
        packed = fast[index].packed("weight")
        packed.decode = lambda own=packed.decode, index=index: decoded.append(index) or own()
    with torch.inference_mode():
        expected = lean(ids)
        for _ in range(3):
            torch.testing.assert_close(fast(ids), expected, rtol=0, atol=1e-6)
    assert sorted(decoded) == [0, 1, 3]
    torch.testing.assert_close(fast(ids), expected, rtol=0, atol=1e-6)
    assert len(decoded) > 3  # with gradients nothing is kept
    kept = [key for index in (0, 1, 3) for key in lean[index].packed("weight")._made]
    assert set(kept) <= {"codes"}  # where they are not stored in whole bytes


@torch.no_grad()
def test_what_is_kept_follows_the_weight():
    fast, ids = set_memory(model("int8"), "fast"), torch.randint(20, (2, 8))
    first = fast(ids)
    other = model("int8")
    for index in (0, 1, 3):
        other[index].packed("weight").codes.random_(0, 255)
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(ids), other(ids), rtol=0, atol=1e-6)
    assert (fast(ids) - first).abs().max() > 0.1
    fast.double()
    assert fast(ids).dtype == torch.float64
    set_memory(fast, "lean")
    assert not fast[3].packed("weight")._made


@torch.no_grad()
@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("policy", [Int(8, activation=Int(8)), Int(4), PQ(8, 16)], ids=str)
def test_the_default_device_does_not_matter(policy, memory):
    """A model on the CPU computes there, also where new tensors are made elsewhere by default."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.Flatten(2), nn.Linear(144, 160)).eval()
    inputs = [torch.randn(n, 32, 12, 12) for n in (1, 2, 20)]
    packed = set_memory(quantize(copy.deepcopy(net), policy), memory)
    expected = [packed(x) for x in inputs]
    with torch.device("meta"):
        again = set_memory(quantize(net, policy), memory)
        for x, y in zip(inputs, expected, strict=True):
            assert torch.equal(again(x), y)


def test_the_word_is_checked():
    with pytest.raises(ValueError, match="'lean' or 'fast', got 'quick'"):
        set_memory(nn.Linear(2, 2), "quick")
