import numpy as np
import pytest
import torch
from references import squared_distances
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qnoise.ops import kmeans_assign
from lightning_qnoise.ops import kmeans_library as module

OPS = torch.ops.lightning_qnoise
each_route = pytest.mark.parametrize("route", [module._cpu, module._reference], ids=["cpu", "reference"])


def check(found, points, centroids, tolerance=1e-5):
    """Against NumPy in float64; which of two almost equally near ones is taken does not count."""
    codes, distances = found
    expected = squared_distances(points.float().numpy(), centroids.float().numpy())
    assert (codes.dtype, distances.dtype) == (torch.int64, torch.float32)
    chosen = expected[np.arange(len(points)), codes.numpy()]
    size = float(points.double().square().sum(1).max() + 1) if len(points) else 1
    np.testing.assert_allclose(chosen, expected.min(1), rtol=0, atol=tolerance * size)
    np.testing.assert_allclose(distances.numpy(), expected.min(1), rtol=0, atol=tolerance * size)


@each_route
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 1), (1000, 1, 2), (999, 8, 256), (70, 9, 33), (5, 65, 7), (3, 2, 4000), (0, 3, 5)]
)
def test_the_nearest_and_its_distance(route, n, d, k):
    points, centroids = torch.randn(n, d), torch.randn(k, d)
    check(route(points, centroids), points, centroids)


@each_route
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(route, dtype):
    points, centroids = torch.randn(200, 8).to(dtype), torch.randn(20, 8).to(dtype)
    found = route(points, centroids)
    check(found, points, centroids)
    assert all(map(torch.equal, found, route(points.float(), centroids.float())))


@each_route
def test_strided_inputs(route):
    points, centroids = torch.randn(8, 60).t(), torch.randn(12, 16)[:, ::2]
    check(route(points, centroids), points, centroids)
    points = torch.randn(8).expand(30, 8)
    check(route(points, centroids), points, centroids)


@each_route
def test_the_first_of_equals(route):
    points, centroids = torch.randint(-2, 3, (3000, 3)).float(), torch.randint(-2, 3, (200, 3)).float() + 0.5
    expected = squared_distances(points.numpy(), centroids.numpy())  # exact: small integers and halves
    codes, distances = route(points, centroids)
    np.testing.assert_array_equal(codes, expected.argmin(1))
    np.testing.assert_array_equal(distances, expected.min(1))


@each_route
def test_nan_and_infinity(route):
    """As `argmin` of the whole matrix has it: NaN is least of all."""
    points = torch.tensor([[0.6, 0.0], [torch.nan, 1.0], [2.0, 1.0], [torch.inf, 0.0]])
    for place in (None, 0, 3):
        centroids = torch.randn(5, 2)
        if place is not None:
            centroids[place, 1] = torch.nan
        cost = centroids.square().sum(1) - 2 * points @ centroids.t()
        codes, distances = route(points, centroids)
        assert torch.equal(codes, cost.argmin(1))
        expected = cost.amin(1) + points.square().sum(1)
        torch.testing.assert_close(distances, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert torch.equal(route(points[:1], torch.full((3, 2), torch.inf))[0], torch.tensor([0]))


@each_route
def test_chunks_leave_no_trace(route, monkeypatch):
    points, centroids = torch.randint(-9, 9, (3001, 4)).float(), torch.randint(-9, 9, (30, 4)).float()
    expected = route(points, centroids)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 30 * 64)
    monkeypatch.setattr(module, "_CHUNK_FACTOR", 1)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in (out if isinstance(out, tuple | list) else (out,))))
            return out

    with Watch():
        found = route(points, centroids)
    assert all(map(torch.equal, found, expected))
    assert largest == 3001 * 4  # the points; no matrix of distances


def test_the_route_of_a_cpu_is_the_one_that_runs():
    points, centroids = torch.randn(3000, 4), torch.randn(30, 4)
    assert all(map(torch.equal, kmeans_assign(points, centroids), module._cpu(points, centroids)))


def test_what_does_not_fit_is_refused():
    for points, centroids in [((3, 4), (2, 5)), ((3, 4), (0, 4)), ((3,), (2, 4)), ((3, 4), (4,))]:
        for device in ("cpu", "meta"):
            with pytest.raises(ValueError, match=r"expected points \[n, d\] and centroids \[k, d\] with k >= 1, got"):
                kmeans_assign(torch.zeros(points, device=device), torch.zeros(centroids, device=device))
    with pytest.raises(ValueError, match=r"expected floats, got torch.int64 and torch.float32"):
        kmeans_assign(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4))


def test_no_gradient():
    points = torch.randn(5, 4, requires_grad=True)
    _, distances = kmeans_assign(points, torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="no gradient"):
        distances.sum().backward()


def test_opcheck():
    for n in (0, 20):
        torch.library.opcheck(OPS.kmeans_assign.default, (torch.randn(n, 4), torch.randn(3, 4)))
        torch.library.opcheck(OPS.kmeans_assign.default, (torch.randn(n, 4).half(), torch.randn(4, 3).double().t()))


def test_autocast_and_default_dtype_change_nothing():
    points, centroids = torch.randn(300, 4), torch.randn(32, 4)
    expected = kmeans_assign(points, centroids)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, kmeans_assign(points, centroids), expected))
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, kmeans_assign(points, centroids), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled_whole():
    centroids = torch.randn(32, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda points: centroids[kmeans_assign(points, centroids)[0]], fullgraph=True, backend="aot_eager"
    )
    for n in (7, 300):
        points = torch.randn(n, 4)
        assert torch.equal(compiled(points), centroids[kmeans_assign(points, centroids)[0]])


@torch.inference_mode()
def test_inference_mode():
    points, centroids = torch.randn(30, 4), torch.randn(3, 4)
    check(kmeans_assign(points, centroids), points, centroids)
