import pytest
import torch
from kernels.random_weights import LAYOUTS, poison, random_weight

from lightning_qnoise.kernels.decode import pq_decode
from lightning_qnoise.kernels.embedding import pq_embedding


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 9, 16])
def test_block_sizes(d, dtype):
    weight = random_weight(n_out=5, groups=6, d=d, dtype=dtype)
    assert torch.equal(pq_decode(*weight.args), weight.dense)
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(pq_embedding(ids, *weight.args), weight.dense[ids])


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_out": 1, "groups": 1},
        {"n_out": 35, "groups": 65},  # several programs
        {"k": 1},
        {"k": 2},
        {"k": 13},
        {"k": 256, "groups": 48},
        {"k": 300, "code_dtype": torch.int16},
        {"k": 300, "code_dtype": torch.int32},
        {"d": 300},
    ],
    ids=str,
)
def test_shapes(sizes):
    weight = random_weight(**sizes)
    assert torch.equal(pq_decode(*weight.args), weight.dense)
    ids = torch.randint(len(weight.codes), (2, 3))
    assert torch.equal(pq_embedding(ids, *weight.args), weight.dense[ids])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [15, 16])
def test_strides(layout, groups):
    weight = random_weight(groups=groups, layout=layout)
    codebook = weight.codebook.t().contiguous().t()
    assert torch.equal(pq_decode(weight.codes, codebook), weight.dense)
    ids = torch.randint(20, (6, 4))[::2].t()
    assert torch.equal(pq_embedding(ids, weight.codes, codebook), weight.dense[ids])


def test_other_dtype_and_own_memory():
    weight = random_weight()
    out = torch.full((20, 40), torch.nan, dtype=torch.float16)
    assert pq_decode(*weight.args, out=out) is out
    assert torch.equal(out, weight.dense.half())
    assert torch.equal(pq_decode(*weight.args, dtype=torch.bfloat16), weight.dense.bfloat16())
    ids = torch.arange(3, dtype=torch.int32)
    assert torch.equal(pq_embedding(ids, *weight.args, dtype=torch.float16), weight.dense[:3].half())


def test_nothing_to_decode():
    assert pq_decode(*random_weight(n_out=0).args).shape == (0, 40)
    assert pq_decode(*random_weight(groups=0).args).shape == (20, 0)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert pq_embedding(none, *random_weight(n_out=0).args).shape == (2, 0, 40)
    assert pq_embedding(torch.tensor(3), *random_weight().args).shape == (40,)


def test_an_id_that_names_no_row_is_nan():
    weight = random_weight(n_out=4, dtype=torch.float16)
    rows = pq_embedding(torch.tensor([3, 4, -1, 0, 2**31 + 1]), *weight.args)
    assert rows[[1, 2, 4]].isnan().all()
    assert torch.equal(rows[[0, 3]], weight.dense[[3, 0]])


def test_layouts_are_checked():
    codes, codebook = random_weight().args
    with pytest.raises(ValueError, match=r"\[out, groups\] and \[K, d\] with K, d > 0, got \[100\] and \[12, 8\]"):
        pq_decode(codes.flatten(), codebook)
    with pytest.raises(ValueError, match=r"got \[20, 5\] and \[0, 8\]"):
        pq_decode(codes, codebook[:0])
    with pytest.raises(TypeError, match=r"uint8, int16 or int32, got torch.int64"):
        pq_decode(codes.long(), codebook)
    with pytest.raises(TypeError, match="float64"):
        pq_decode(codes, codebook.double())
    with pytest.raises(TypeError, match=r"to torch.float16 in a tensor of torch.float32"):
        pq_decode(codes, codebook, torch.float16, torch.empty(20, 40))
    with pytest.raises(ValueError, match=r"\[20, 40\], got \[20, 41\]"):
        pq_decode(codes, codebook, out=torch.empty(20, 41))
    with pytest.raises(ValueError, match="on one device"):
        pq_decode(codes.to("meta"), codebook)
    with pytest.raises(TypeError, match=r"got torch.int16"):
        pq_embedding(torch.zeros(2, dtype=torch.int16), codes, codebook)
    with pytest.raises(TypeError, match=r"torch.float64"):
        pq_embedding(torch.zeros(2).long(), codes, codebook, torch.float64)
    with pytest.raises(ValueError, match="no row, but 2 are asked for"):
        pq_embedding(torch.zeros(2).long(), codes[:0], codebook)
