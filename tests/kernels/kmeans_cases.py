import pytest
import torch
from kernels.random_weights import poison

from lightning_qnoise.kernels.assign import pq_assign
from lightning_qnoise.kernels.layout import segments
from lightning_qnoise.kernels.segment_sum import segment_sum


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def check_sum(blocks, codes, k, parts=None):
    sums = segment_sum(blocks, *segments(codes, k), parts=parts)
    expected = torch.zeros(k, blocks.shape[1]).double().index_add(0, codes.flatten(), blocks.double())
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 9, 16])
def test_sum_of_block_sizes(d, dtype):
    check_sum(torch.randn(50, d).to(dtype), torch.randint(6, (10, 5)), 6)


@pytest.mark.parametrize("parts", [None, 1, 3, 7])
def test_sum_of_skewed_and_empty_segments(parts):
    codes = torch.cat([torch.zeros(300).long(), torch.randint(9, (80,))])
    codes[codes == 4] = 5
    check_sum(torch.randn(380, 4), codes, 11, parts)


def test_sum_of_nothing():
    check_sum(torch.randn(0, 4), torch.zeros(0).long(), 3)
    assert segment_sum(torch.randn(0, 4), *segments(torch.zeros(0).long(), 0)).shape == (0, 4)


def test_arguments_of_the_sum_are_checked():
    order, offsets = segments(torch.randint(3, (10,)), 3)
    with pytest.raises(TypeError, match="are int32"):
        segment_sum(torch.randn(10, 4), order.long(), offsets)
    with pytest.raises(ValueError, match=r"got \[9, 4\], \[10\] and \[4\]"):
        segment_sum(torch.randn(9, 4), order, offsets)
    with pytest.raises(ValueError, match="contiguous"):
        segment_sum(torch.randn(4, 10).t(), order, offsets)


def check_assign(blocks, centroids):
    codes = pq_assign(blocks, centroids).long()
    distances = torch.cdist(blocks.double(), centroids.double()) ** 2
    chosen = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(dim=1).values, rtol=1e-6, atol=1e-5)
    clear = distances.topk(min(2, len(centroids)), largest=False).values.diff().abs().flatten() > 1e-4
    if len(centroids) > 1:
        assert torch.equal(codes[clear], distances.argmin(dim=1)[clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 9, 16])
def test_nearest_of_block_sizes(d, dtype):
    check_assign(torch.randn(20, d).to(dtype), torch.randn(12, d).to(dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 3), (5, 64), (300, 150), (9, 65)])
def test_nearest_of_shapes(n, k):
    check_assign(torch.randn(n, 8), torch.randn(k, 8))


def test_nearest_of_strided_and_mixed():
    check_assign(torch.randn(8, 40).t(), torch.randn(12, 8))
    check_assign(torch.randn(30, 8).bfloat16(), torch.randn(12, 8))
    check_assign(torch.randn(8).expand(30, 8), torch.randn(12, 8))


def test_the_first_of_equals_is_nearest():
    centroids = torch.randint(-50, 50, (150, 4)).float()  # no distance rounds
    centroids[70:140] = centroids[0:70]  # in the same tile and in other ones
    centroids[20] = centroids[5]
    codes = pq_assign(centroids, centroids)
    expected = torch.cat([torch.arange(70), torch.arange(70), torch.arange(140, 150)])
    expected[20], expected[90] = 5, 90  # the copy of what 20 was
    assert torch.equal(codes.long(), expected)


def test_nan():
    centroids = torch.tensor([[torch.nan], [1.0], [0.5]])
    assert pq_assign(torch.tensor([[0.6], [2.0]]), centroids).tolist() == [2, 1]
    assert 0 <= pq_assign(torch.tensor([[torch.nan]]), centroids).item() < 3


def test_arguments_of_the_assignment_are_checked():
    assert pq_assign(torch.randn(0, 4), torch.randn(2, 4)).shape == (0,)
    for blocks, centroids in [((3, 4), (2, 5)), ((3, 65), (2, 65)), ((3, 4), (0, 4)), ((3,), (2, 4))]:
        with pytest.raises(ValueError, match="centroids"):
            pq_assign(torch.randn(blocks), torch.randn(centroids))
