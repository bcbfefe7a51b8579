"""What is computed and by which variants of ours: products with a matrix, their gradients, assignments of k-means."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.variants import Variant, n_bytes
from lightning_qnoise.ops import pq_cpu, pq_cuda
from lightning_qnoise.ops.library import OPS, has_triton

CODEWORDS, BLOCK = 256, 8
MOST_ROWS = {  # for which a route is measured
    "cpu": {"gather": 8, "lookup": 2**20, "decode": 2**20},
    "cuda": {"lookup": 16, "gemv": 64, "gemm": 512, "decode": 2**20},
}
BASELINES = {"forward": "dense", "dx": "dense", "dc": "dense", "assign": "matmul + argmin"}
_T = TypeVar("_T")


class Case(NamedTuple):
    """One thing to compute; `rows` of `x`, or points."""

    task: str
    n_out: int
    n_in: int
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.task} {self.n_out}x{self.n_in} M={self.rows} {str(self.dtype).removeprefix('torch.')}"


class Weights:
    """Copies of a random product-quantized matrix; all codes are as likely.

    Args:
        n_out: Outputs.
        n_in: Inputs.
        dtype: Of codebooks, inputs and results.
        device: `"cpu"` or `"cuda"`.
        rotated: Bytes that all copies of one kind take together at the least.
    """

    def __init__(self, n_out: int, n_in: int, dtype: torch.dtype, device: str, rotated: int) -> None:
        self.shape, self.dtype, self.device, self.rotated = (n_out, n_in), dtype, device, rotated
        self.generator = torch.Generator(device).manual_seed(0)
        self._made: dict[str, Any] = {}
        copies, groups = self.copies(n_out * n_in // BLOCK), n_in // BLOCK
        self.codes = self.integers(CODEWORDS, copies, n_out, groups).to(torch.uint8)
        self.codebooks = self.random(copies, CODEWORDS, BLOCK)

    def copies(self, n_bytes: int) -> int:
        """Return how many copies of so many bytes there have to be."""
        return max(1, -(-self.rotated // n_bytes))

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        """Return integers in `[0, end)`, of at most one byte."""
        return torch.randint(end, shape, generator=self.generator, device=self.device, dtype=torch.uint8)

    def made(self, key: str, make: Callable[[], _T]) -> _T:
        """Return what `make` returned the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def matrix(self, i: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return copy i, decoded by indexing."""
        return self.codebooks[i].to(dtype)[self.codes[i].int()].flatten(1)

    @property
    def dense(self) -> list[Tensor]:
        """The first copies as they decode."""
        count = min(len(self.codes), self.copies(self.shape[0] * self.shape[1] * self.dtype.itemsize))
        return self.made("dense", lambda: [self.matrix(i, self.dtype) for i in range(count)])

    def quantized(self, name: str, function: Callable[..., Tensor], expected: Any, moved: int, **more: Any) -> Variant:
        """Return a variant that calls `function(codes, codebook)`; `moved` bytes besides these."""
        pairs = list(zip(self.codes, self.codebooks, strict=True))
        return Variant(name, [partial(function, *pair) for pair in pairs], expected, n_bytes(*pairs[0]) + moved, **more)


def forward(weights: Weights, x: Tensor) -> list[Variant]:
    """`x @ W.T`, with the operator, each of its routes, and from the decoded matrix."""
    size = len(x) * weights.shape[0] * x.element_size()
    moved, expected = n_bytes(x) + size, lru_cache(2)(lambda i: x.double() @ weights.matrix(i).t())
    dense = [partial(F.linear, x, weight) for weight in weights.dense]
    add = partial(weights.quantized, expected=expected, moved=moved)
    found = [
        Variant("dense", dense, expected, n_bytes(weights.dense[0]) + moved),
        add("pq_linear", lambda *pair: OPS.pq_linear(x, *pair), detail=chosen(weights, len(x))),
        add("pq_decode + linear", lambda *pair: F.linear(x, OPS.pq_decode(*pair, x.dtype))),
        add("index + linear", lambda codes, table: F.linear(x, F.embedding(codes.int(), table).flatten(1))),
    ]
    return found + [add(f"route {name}", partial(route, x)) for name, route in routes(weights, x).items()]


def chosen(weights: Weights, rows: int) -> str:
    """Return the route that `pq_linear` takes for so many rows."""
    if weights.device == "cpu":
        return pq_cpu.choose_route(rows, weights.shape[0], CODEWORDS, BLOCK)
    known = has_triton() and weights.dtype in pq_cuda.ROWS
    return pq_cuda.choose_route(rows, weights.shape[0], CODEWORDS, BLOCK, weights.dtype) if known else "reference"


def routes(weights: Weights, x: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Return what the operator chooses from, `route(x, codes, codebook)`, where it may be worth it."""
    on_cpu = weights.device == "cpu"
    if x.dtype != torch.float32 if on_cpu else not has_triton():
        return {}
    linear, names = (pq_cpu if on_cpu else pq_cuda).linear, MOST_ROWS[weights.device].items()
    return {name: partial(linear, route=name) for name, most in names if len(x) <= most}


def dx(weights: Weights, x: Tensor) -> list[Variant]:
    """`grad @ W`."""
    grad = weights.random(len(x), weights.shape[0])
    moved, expected = n_bytes(grad, x), lru_cache(2)(lambda i: grad.double() @ weights.matrix(i))
    add = partial(weights.quantized, expected=expected, moved=moved)
    dense = [partial(torch.matmul, grad, weight) for weight in weights.dense]
    return [
        Variant("dense", dense, expected, n_bytes(weights.dense[0]) + moved),
        add("pq_input_grad", lambda *pair: OPS.pq_input_grad(grad, *pair)),
        add("pq_decode + matmul", lambda *pair: grad @ OPS.pq_decode(*pair, grad.dtype)),
    ]


def dc(weights: Weights, x: Tensor) -> list[Variant]:
    """The gradient of the codebook; "dense" is that of the dense matrix, `grad.T @ x`."""
    grad = weights.random(len(x), weights.shape[0]) / 8  # sums stay below what float16 holds
    matrix = lru_cache(1)(lambda: grad.double().t() @ x.double())
    n_dense = weights.shape[0] * weights.shape[1] * x.element_size()

    def add_blocks(codes: Tensor, codebook: Tensor) -> Tensor:
        total = torch.zeros_like(codebook, dtype=torch.float32)
        blocks = (grad.t() @ x).view(-1, BLOCK).float()
        return total.index_add_(0, codes.flatten().int(), blocks).to(codebook.dtype)

    @lru_cache(2)
    def expected(i: int) -> Tensor:
        total = torch.zeros(CODEWORDS, BLOCK, dtype=torch.float64, device=x.device)
        return total.index_add_(0, weights.codes[i].flatten().int(), matrix().view(-1, BLOCK))

    add = partial(weights.quantized, expected=expected, moved=n_bytes(grad, x))
    return [
        Variant("dense", [lambda: grad.t() @ x], lambda i: matrix(), n_bytes(grad, x) + n_dense),
        add("pq_codebook_grad", lambda *pair: OPS.pq_codebook_grad(grad, x, *pair, False)),
        add("dense + index_add_", add_blocks),
    ]


def assign(weights: Weights, points: int) -> list[Variant]:
    """The nearest of the codewords to every block of a float32 matrix, by distances in float64."""
    count = weights.copies(points * BLOCK * 4)
    blocks = weights.random(count, points, BLOCK, dtype=torch.float32)
    centroids = weights.random(CODEWORDS, BLOCK, dtype=torch.float32)

    def distance(codes: Tensor, i: int) -> Tensor:
        found = (blocks[i].double() - centroids.double()[codes.clamp(0, CODEWORDS - 1)]).square().sum(1)
        return torch.where((codes >= 0) & (codes < CODEWORDS), found, torch.nan)

    @lru_cache(2)
    def expected(i: int) -> Tensor:
        parts = blocks[i].double().split(1 << 16)
        return torch.cat([torch.cdist(part, centroids.double()).amin(1) for part in parts]).square()

    def matmul(points: Tensor) -> Tensor:
        return torch.addmm(centroids.square().sum(1), points, centroids.t(), alpha=-2).argmin(1)

    functions = {"matmul + argmin": matmul, "kmeans_assign": lambda points: OPS.kmeans_assign(points, centroids)[0]}
    moved = n_bytes(blocks[0], centroids) + points * 8
    return [
        Variant(name, [partial(function, part) for part in blocks], expected, moved, read=distance)
        for name, function in functions.items()
    ]
