import pytest
import torch
from kernels.random_weights import poison, random_weight

from lightning_qnoise.kernels.decode import pq_decode


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 9, 16])
def test_block_sizes(d, dtype):
    weight = random_weight(n_out=5, n_in=6 * d, d=d, dtype=dtype)
    assert torch.equal(pq_decode(*weight.args), weight.dense)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_out": 1, "n_in": 8},
        {"n_out": 70, "n_in": 130},  # several programs, the last block is cut
        {"n_out": 3, "n_in": 7, "d": 4},
        {"k": 1},
        {"k": 2, "bits": 1},
        {"k": 4, "bits": 2},
        {"k": 13, "bits": 4},
        {"k": 300, "bits": 16},
        {"k": 256, "n_in": 100, "n_out": 33},
        {"n_in": 48, "n_codebooks": 3},
        {"word": torch.uint8},
        {"k": 300, "bits": 16, "word": torch.int16},
    ],
    ids=str,
)
def test_shapes(sizes):
    weight = random_weight(**sizes)
    assert torch.equal(pq_decode(*weight.args), weight.dense)


def test_other_dtype_and_own_memory():
    weight = random_weight()
    out = torch.full((20, 40), torch.nan, dtype=torch.float16)
    assert pq_decode(*weight.args, out=out) is out
    assert torch.equal(out, weight.dense.half())
    torch.testing.assert_close(pq_decode(*weight.args, dtype=torch.bfloat16), weight.dense.bfloat16())


def test_nothing_to_decode():
    assert pq_decode(*random_weight(n_out=0).args).shape == (0, 40)


def test_layouts_are_checked():
    words, codebook, *rest = random_weight().args
    with pytest.raises(ValueError, match=r"contiguous \[2, out\], got torch.int32 \[1, 20\]"):
        pq_decode(words[:1], codebook, *rest)
    with pytest.raises(ValueError, match=r"contiguous \[n, K, 8\]"):
        pq_decode(words, codebook[..., :7], *rest)
    with pytest.raises(ValueError, match="n divides 5 groups"):
        pq_decode(words, codebook.repeat(2, 1, 1), *rest)
    with pytest.raises(TypeError, match="got 3 in"):
        pq_decode(words, codebook, 40, 8, 3)
    with pytest.raises(TypeError, match="float64"):
        pq_decode(words, codebook.double(), *rest)
    with pytest.raises(ValueError, match=r"\[20, 40\], got \[20, 41\]"):
        pq_decode(words, codebook, *rest, out=torch.empty(20, 41))
    with pytest.raises(ValueError, match="on one device"):
        pq_decode(words.to("meta"), codebook, *rest)
