"""k-means on a Gaussian weight matrix cut in blocks: seconds and relative error of ours and of others, in turns.

`python benchmarks/kmeans.py` prints a row per method and shape and writes `results/kmeans.csv` here. Every round runs
all methods one after another with another seed; the ratio to faiss over all points is the median over rounds, which a
noisy machine leaves alone. The relative error, a mean over rounds, is `sum |x - c|^2 / sum |x|^2` over all points.

There are two stand-ins for fairseq's EM, written from its description: the memory layout that it has (all distances
at once, over 1 GB) and a friendlier one. They run one round, and on large matrices only with `--full`. `--device cuda`
adds ours on the GPU, with a 4096x4096 matrix. Where faiss or scikit-learn is absent, its row says so.

The assignment alone, `kmeans_assign`, against the plain expression with the matrix of all points and centroids goes
into `results/kmeans_assign.csv` (`--only assign`): the median milliseconds of rounds in turns, the median of the ratio
within a round, and "MiB", what each holds at its peak besides its arguments.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from kernel_bench.timers import peak_bytes
from torch import Tensor

from lightning_qnoise.ops import kmeans_assign
from lightning_qnoise.schemes.kmeans import kmeans, nearest

D, K, ITERATIONS = 8, 256, 20
POINTS = (2**18, 2**21)  # of the assignment
MISSING = "not installed"


def ours(points: Tensor, seed: int) -> Tensor:
    """The package's k-means."""
    return kmeans(points, K, n_iter=ITERATIONS, seed=seed)


def broadcast(points: Tensor, seed: int, chunk: int = 1 << 12) -> Tensor:
    """Plain broadcasting: norms of the differences `[n, K, d]` by chunks in cache, and a Python loop of means."""

    def assign(centroids: Tensor) -> Tensor:
        return torch.cat([(part[:, None] - centroids).norm(dim=2).argmin(dim=1) for part in points.split(chunk)])

    return loop(points, seed, assign)


def fairseq(points: Tensor, seed: int) -> Tensor:
    """What fairseq's EM computes: norms of the differences `[K, d, n]` at once, and codes counted one by one."""
    columns = points.T.contiguous()

    def assign(centroids: Tensor) -> Tensor:
        codes = (columns[None] - centroids[:, :, None]).norm(dim=1).argmin(dim=0)
        Counter(code.item() for code in codes)  # where it looks for empty clusters
        return codes

    return loop(points, seed, assign)


def loop(points: Tensor, seed: int, assign: Callable[[Tensor], Tensor]) -> Tensor:
    """Alternate the assignment and one mean a cluster."""
    generator = torch.Generator().manual_seed(seed)
    centroids = points[torch.randint(len(points), (K,), generator=generator)]
    for _ in range(ITERATIONS):
        codes = assign(centroids)
        means = torch.stack([points[codes == cluster].mean(dim=0) for cluster in range(K)])
        centroids = torch.where(means.isnan(), centroids, means)
    return centroids


def sklearn(points: Tensor, seed: int) -> Tensor:
    """scikit-learn, one run from random points."""
    from sklearn.cluster import KMeans

    found = KMeans(K, init="random", n_init=1, max_iter=ITERATIONS, tol=0, random_state=seed).fit(points.numpy())
    return torch.from_numpy(found.cluster_centers_)


def faiss_all(points: Tensor, seed: int) -> Tensor:
    """Run faiss over all points."""
    return faiss_default(points, seed, max_points_per_centroid=len(points))


def faiss_default(points: Tensor, seed: int, **options: int) -> Tensor:
    """Run faiss with torch's number of threads, where not told otherwise on 256 points a cluster."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    clustering = faiss.Kmeans(D, K, niter=ITERATIONS, seed=seed, **options)
    clustering.train(points.numpy())
    return torch.from_numpy(clustering.centroids)


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ours": ours,
    "faiss all points": faiss_all,
    "faiss default sampling": faiss_default,
    "scikit-learn random init": sklearn,
    "broadcast in chunks": broadcast,
    "fairseq's algorithm (broadcast at once)": fairseq,
}
ON_GPU = ["ours"]
SLOW = ["broadcast in chunks", "fairseq's algorithm (broadcast at once)"]


def error(points: Tensor, centroids: Tensor) -> float:
    """Return the relative squared error."""
    difference = points - centroids.to(points)[nearest(points, centroids.to(points))]
    return float(difference.square().double().sum() / points.square().double().sum())


def run(method: str, points: Tensor, seed: int) -> tuple[float, Tensor]:
    """Return the seconds and the centroids of one run."""
    start = time.perf_counter()
    centroids = METHODS[method](points, seed)
    if points.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, centroids


def measure(rows: int, cols: int, methods: list[str], device: str, rounds: int) -> list[dict[str, object]]:
    """Return a row per method for one shape."""
    points = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).view(-1, D).to(device)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    errors: dict[str, list[float]] = {method: [] for method in methods}
    if device != "cpu":
        run("ours", points, 0)  # start the device
    for turn in range(rounds):
        for method in methods:
            if turn and method in SLOW:
                continue
            try:
                spent, centroids = run(method, points, turn)
            except ImportError:
                continue
            seconds[method].append(spent)
            errors[method].append(error(points, centroids))
    return [
        {
            "method": method,
            "shape": f"{rows}x{cols}",
            "seconds": round(statistics.median(seconds[method]), 4) if seconds[method] else MISSING,
            "relative_error": round(statistics.mean(errors[method]), 5) if errors[method] else "",
            "ratio_to_faiss": ratio(seconds[method], seconds.get("faiss all points", [])),
            "rounds": len(seconds[method]),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
        }
        for method in methods
    ]


def ratio(ours: list[float], theirs: list[float]) -> float | str:
    """Return the median over rounds of the ratio of two times."""
    pairs = list(zip(ours, theirs, strict=False))  # the broadcast EM has one round
    return round(statistics.median(a / b for a, b in pairs), 3) if pairs else ""


def plain_assign(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroids as one writes it down, with all distances at once."""
    return (centroids.square().sum(1) - 2 * points @ centroids.T).argmin(1)


def measure_assign(n: int, rounds: int) -> list[dict[str, object]]:
    """Return a row for each way to assign `n` points."""
    torch.manual_seed(0)
    points, centroids = torch.randn(n, D), torch.randn(K, D)
    ways = {
        "kmeans_assign": lambda: kmeans_assign(points, centroids)[0],
        "whole matrix": lambda: plain_assign(points, centroids),
    }
    found, expected = (way() for way in ways.values())
    if (found == expected).float().mean() < 0.9999:  # equally near within rounding
        raise SystemExit("the assignments differ")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            seconds[name].append(time.thread_time() - start)
    return [
        {
            "way": name,
            "points": n,
            "ms": round(1000 * statistics.median(seconds[name]), 1),
            "times_faster": ratio(seconds["whole matrix"], seconds[name]),
            "MiB": round(peak_bytes(way) / 2**20, 1),
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        for name, way in ways.items()
    ]


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Print and write a table."""
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x1024"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--full", action="store_true", help="the broadcast EM on every shape: ten minutes and more")
    parser.add_argument("--only", choices=["kmeans", "assign"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kmeans.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    jobs = [(shape, "cpu") for shape in arguments.shapes]
    if arguments.device == "cuda":
        jobs += [(shape, "cuda") for shape in (*arguments.shapes, "4096x4096")]
    if arguments.only != "assign":
        rows = []
        for shape, device in jobs:
            height, width = map(int, shape.split("x"))
            methods = list(METHODS) if device == "cpu" else ON_GPU
            if height * width > 1 << 20 and not arguments.full:
                methods = [method for method in methods if method not in SLOW]
            rows += measure(height, width, methods, device, arguments.rounds)
        write(rows, arguments.out)
    if arguments.only != "kmeans":
        rows = [row for n in POINTS for row in measure_assign(n, arguments.rounds)]
        write(rows, arguments.out.with_name("kmeans_assign.csv"))


if __name__ == "__main__":
    main()
