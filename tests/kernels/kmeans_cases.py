import pytest
import torch
from kernels.random_weights import poison

from lightning_qnoise.kernels import assign
from lightning_qnoise.kernels.assign import pq_assign
from lightning_qnoise.kernels.layout import segments
from lightning_qnoise.kernels.segment_sum import segment_sum
from lightning_qnoise.ops import kmeans_assign, kmeans_library


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


@pytest.mark.parametrize(("k", "dtype"), [(256, torch.uint8), (257, torch.uint8), (300, torch.int16), (1, torch.int32)])
def test_segments(k, dtype):
    codes = torch.randint(min(k, 200), (40, 7)).to(dtype).t()  # some are unused
    order, offsets = segments(codes, k)
    flat = codes.flatten().long()
    assert order.dtype == offsets.dtype == torch.int32
    assert torch.equal(order.long(), flat.argsort(stable=True))
    assert torch.equal(offsets.diff().long(), torch.bincount(flat, minlength=k))
    assert offsets[0] == 0 and len(offsets) == k + 1


def test_more_segments_than_32_bits_count():
    with pytest.raises(ValueError, match="at most 2147483647 blocks"):
        segments(torch.empty(2**31, dtype=torch.uint8, device="meta"), 256)


def test_sum_of_long_blocks():
    check_sum(torch.randn(9, 300), torch.randint(2, (9,)), 2)


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
    codes, found = pq_assign(blocks, centroids)
    assert (codes.dtype, found.dtype) == (torch.int64, torch.float32)
    distances = (blocks.double()[:, None] - centroids.double()).square().sum(2)
    torch.testing.assert_close(found.double(), distances.min(dim=1).values, rtol=1e-6, atol=1e-5)
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
@pytest.mark.parametrize("d", [8, 33])
def test_nearest_of_shapes(n, k, d):
    check_assign(torch.randn(n, d), torch.randn(k, d))


def test_nearest_of_strided_and_mixed():
    check_assign(torch.randn(8, 40).t(), torch.randn(12, 8))
    check_assign(torch.randn(30, 8).bfloat16(), torch.randn(12, 8))
    check_assign(torch.randn(8).expand(30, 8), torch.randn(12, 8))


def test_the_first_of_equals_is_nearest():
    centroids = torch.randint(-50, 50, (150, 4)).float()  # no distance rounds
    centroids[70:140] = centroids[0:70]  # in the same tile and in other ones
    centroids[20] = centroids[5]
    codes, distances = pq_assign(centroids, centroids)
    assert not distances.any()
    expected = torch.cat([torch.arange(70), torch.arange(70), torch.arange(140, 150)])
    expected[20], expected[90] = 5, 90  # the copy of what 20 was
    assert torch.equal(codes, expected)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # in NumPy, the interpreter
def test_nan_and_infinity_are_those_of_torch():
    """And of the CPU's route, which other tests hold against torch; in the second of two tiles, too."""
    points = torch.tensor([[torch.nan, 0.0], [0.6, 1.0], [2.0, 3.0], [torch.inf, 1.0], [1e30, 1.0]])
    for place in (None, 2, 67):
        centroids = torch.arange(140.0).view(70, 2)
        if place is not None:
            centroids[place, 1] = torch.nan
        for found, expected in zip(pq_assign(points, centroids), kmeans_assign(points, centroids), strict=True):
            torch.testing.assert_close(found[:3], expected[:3], equal_nan=True)
            assert torch.equal(found[3:].isnan(), expected[3:].isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dispatch(dtype, monkeypatch):
    """The kernel for up to 64 columns, chunked products beyond."""
    refuse = lambda *args: pytest.fail("the other route")  # noqa: E731
    for d, other in [(64, "_reference"), (65, "pq_assign")]:
        points, centroids = torch.randn(5, d).to(dtype), torch.randn(d, 7, dtype=torch.float64).t()
        with monkeypatch.context() as patched:
            patched.setattr(kmeans_library if other == "_reference" else assign, other, refuse)
            codes, found = kmeans_library._cuda(points, centroids)
        distances = (points.double()[:, None] - centroids).square().sum(2)
        assert (codes.dtype, found.dtype) == (torch.int64, torch.float32)
        assert torch.equal(codes, distances.argmin(1))
        torch.testing.assert_close(found.double(), distances.amin(1), rtol=1e-5, atol=1e-4)


def test_arguments_of_the_assignment_are_checked():
    assert [part.shape for part in pq_assign(torch.randn(0, 4), torch.randn(2, 4))] == [(0,), (0,)]
    for blocks, centroids in [((3, 4), (2, 5)), ((3, 65), (2, 65)), ((3, 4), (0, 4)), ((3,), (2, 4))]:
        with pytest.raises(ValueError, match="centroids"):
            pq_assign(torch.randn(blocks), torch.randn(centroids))
