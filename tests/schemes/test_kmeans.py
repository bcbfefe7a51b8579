from itertools import pairwise

import numpy as np
import pytest
import torch
from references import inertia, squared_distances
from sklearn.cluster import KMeans

from lightning_qnoise.ops import kmeans_library as module
from lightning_qnoise.schemes.kmeans import kmeans, nearest


def test_inertia_is_not_above_sklearns():
    points = torch.randn(1024, 1024).view(-1, 8)
    ours = inertia(points.numpy(), kmeans(points, 256, n_iter=10).numpy())
    start = points.numpy()[np.random.default_rng(0).permutation(len(points))[:256]]
    sklearn = KMeans(256, init=start, n_init=1, max_iter=10, tol=0).fit(points.numpy()).inertia_
    assert 0.97 * sklearn < ours < sklearn  # the seeding spares iterations
    from_start = inertia(points.numpy(), kmeans(points, 256, n_iter=10, init=torch.from_numpy(start)).numpy())
    assert from_start == pytest.approx(sklearn, rel=0.002)


def test_one_step_is_lloyds():
    points, init = torch.randn(500, 3), torch.randn(5, 3)
    codes = squared_distances(points.numpy(), init.numpy()).argmin(1)
    means = np.stack([points.numpy()[codes == k].mean(0) for k in range(5)])
    np.testing.assert_allclose(kmeans(points, 5, n_iter=1, init=init), means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: torch.randn(2000, 4), lambda: torch.randint(0, 4, (2000, 4)).float()])
def test_objective_never_rises(make):
    points = make()
    runs = [inertia(points.numpy(), kmeans(points, 50, n_iter=n, init=points[:50]).numpy()) for n in range(1, 15)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(runs))
    assert runs[-1] < runs[0]


def test_empty_clusters_are_seeded_again():
    points = torch.cat(
        [torch.randn(200, 2) * 0.01 + centre for centre in torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9]])]
    )
    init = torch.zeros(4, 2)  # four times the same centroid: three clusters are empty
    centroids = kmeans(points, 4, n_iter=2, init=init)
    assert len(centroids.round().unique(dim=0)) == 4
    assert inertia(points.numpy(), centroids.numpy()) < 800 * 2 * 0.01**2 * 1.1


def test_draws_with_duplicates_fill_every_cluster():
    points = torch.cat([torch.zeros(5000, 2), torch.arange(20.0).view(10, 2) + 1])  # most draws are the origin
    centroids = kmeans(points, 8)
    codes = squared_distances(points.numpy(), centroids.numpy()).argmin(1)
    assert len(np.unique(codes)) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_work_is_done_in_float32(dtype):
    points = torch.randn(3000, 4).to(dtype)
    centroids = kmeans(points, 32)
    assert centroids.dtype == torch.float32
    assert torch.equal(centroids, kmeans(points.float(), 32))


def test_autocast_and_default_dtype_change_nothing():
    points = torch.randn(3000, 4)
    expected = kmeans(points, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kmeans(points, 32), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(kmeans(points, 32), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_seed_decides_and_the_global_state_is_untouched():
    points = torch.randn(3000, 4)
    before = torch.get_rng_state()
    first = kmeans(points, 32, seed=1)
    torch.manual_seed(123)
    assert torch.equal(kmeans(points, 32, seed=1), first)
    assert not torch.equal(kmeans(points, 32, seed=2), first)
    torch.set_rng_state(before)
    kmeans(points, 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_chunks_leave_no_trace(monkeypatch):
    points = torch.randn(3001, 4)
    expected, codes = kmeans(points, 32), nearest(points, points[:7])
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 32 * 100)
    torch.testing.assert_close(kmeans(points, 32), expected)
    assert torch.equal(nearest(points, points[:7]), codes)


@pytest.mark.parametrize("d", [1, 3, 5, 6, 8, 17])
@pytest.mark.parametrize("distinct", [1, 4, 7])
def test_few_distinct_points_are_the_centroids(d, distinct):
    base = torch.randn(distinct, d)
    points = base[torch.randint(0, distinct, (1003,))]
    centroids = kmeans(points, 7)
    assert torch.equal(centroids, points.unique(dim=0))


def test_minus_zero_is_zero():
    assert len(kmeans(torch.tensor([[0.0], [-0.0], [1.0]]), 2)) == 2


@pytest.mark.parametrize("d, k", [(1, 2), (4, 256), (9, 33)])
def test_nearest_equals_brute_force(d, k):
    points, centroids = torch.randn(1000, d), torch.randn(k, d)
    distances = squared_distances(points.numpy(), centroids.numpy())
    chosen = distances[np.arange(1000), nearest(points, centroids).numpy()]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-4, atol=1e-6)
    assert np.mean(nearest(points, centroids).numpy() == distances.argmin(1)) > 0.999


def test_ties_go_to_the_lowest_index():
    assert nearest(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0], [-1.0], [3.0]])).tolist() == [0, 0]


def test_heavy_tails_and_small_layers_gain_from_the_seeding():
    for points, k in ((torch.randn(2000, 8), 64), (torch.randn(20000, 8) * torch.randn(20000, 1).exp(), 64)):
        ours = inertia(points.numpy(), kmeans(points, k).numpy())
        drawn = [inertia(points.numpy(), kmeans(points, k, init=points[i * k : (i + 1) * k]).numpy()) for i in range(5)]
        assert ours < np.mean(drawn)


def test_ties_among_many_centroids_are_broken():
    points, centroids = torch.randint(-2, 3, (3000, 3)).float(), torch.randint(-2, 3, (200, 3)).float() + 0.5
    cost = centroids.square().sum(1) - 2 * points @ centroids.T  # exact: small integers and halves
    expected = (cost == cost.amin(1, keepdim=True)).int().argmax(1)
    assert torch.equal(nearest(points, centroids), expected)
    assert torch.equal(nearest(torch.zeros(0, 3), centroids), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    "points, k, init, message",
    [
        (torch.randn(8), 2, None, r"shape \[n, d\]"),
        (torch.randn(0, 2), 2, None, r"n > 0"),
        (torch.randn(8, 2), 0, None, "k >= 1"),
        (torch.randn(8, 2), 2, torch.randn(2, 3), r"init of shape \[k, 2\]"),
        (torch.full((8, 2), torch.nan), 2, None, "NaN"),
        (torch.full((8, 2), torch.inf), 2, None, "Inf"),
        (torch.full((8, 2), 1e30), 2, None, "too large to square"),
    ],
)
def test_errors_are_raised_at_once(points, k, init, message):
    with pytest.raises(ValueError, match=message):
        kmeans(points, k, init=init)
