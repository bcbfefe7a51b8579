"""What needs neither a GPU nor triton; `tests/kernels/dispatch_cases.py` runs the kernels in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_qnoise.ops import pq_cuda
from lightning_qnoise.ops.pq_cuda import choose_route, serves

ROOT = Path(__file__).parents[2]
NAMES = ["pq_decode", "pq_linear", "pq_embedding", "pq_input_grad", "pq_codebook_grad", "pq_segment_sum"]
HALVES = (torch.float16, torch.bfloat16)

# Imports the package, runs every operator, and prints which have an implementation of their own for CUDA.
USE = """
import sys
if "hidden" in sys.argv:
    sys.modules["triton"] = None  # as if it were not installed
import torch
from lightning_qnoise.ops import pq_decode, pq_embedding, pq_linear
from lightning_qnoise.ops.library import has_triton

assert has_triton() == (not {"hidden", "off"} & set(sys.argv))
codes, codebook = torch.tensor([[0, 1], [1, 1]]).byte(), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
x = torch.tensor([[1.0, 0.0, 1.0, 0.0]], requires_grad=True)
y = pq_linear(x, codes, codebook)
assert y.tolist() == [[4.0, 6.0]] and pq_decode(codes, codebook).tolist() == [[1, 2, 3, 4], [3, 4, 3, 4]]
assert pq_embedding(torch.tensor([1]), codes, codebook).tolist() == [[3, 4, 3, 4]]
y.sum().backward()
assert x.grad.tolist() == [[4, 6, 6, 8]] and codebook.grad.tolist() == [[1, 0], [3, 0]]
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(name for name in sys.argv[1].split(",") if has(f"lightning_qnoise::{name}", "CUDA")))
print(isinstance(sys.modules.get("lightning_qnoise.kernels.common"), type(sys)))
"""


def run(*args, **variables):
    command = [sys.executable, "-c", USE, ",".join(NAMES), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_triton_the_references_serve_a_gpu():
    assert run("hidden") == ["", "False"]


def test_the_kernels_can_be_switched_off():
    pytest.importorskip("triton")
    assert run("off", LIGHTNING_QNOISE_TRITON="0") == ["", "False"]


def test_with_triton_the_kernels_serve_a_gpu():
    pytest.importorskip("triton")
    assert run() == [" ".join(NAMES), "False"]


@pytest.mark.parametrize("dtype", HALVES)
def test_routes_of_halves(dtype):
    routes = {}
    for rows in range(1, 300):
        routes.setdefault(choose_route(rows, 2**15, 256, 8, dtype), []).append(rows)
    assert {route: (rows[0], rows[-1], len(rows)) for route, rows in routes.items()} == {
        "lookup": (1, 4, 4),
        "gemv": (5, 15, 11),
        "gemm": (16, 256, 241),
        "decode": (257, 299, 43),
    }


def test_routes_of_float32():
    """Which leave tensor cores out."""
    assert [choose_route(rows, 2**15, 256, 8, torch.float32) for rows in (1, 4, 5, 16, 17, 300)] == [
        "lookup",
        "lookup",
        "gemv",
        "gemv",
        "decode",
        "decode",
    ]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_table_is_made_where_it_is_small_beside_the_codes(dtype):
    assert [choose_route(1, n_out, 256, 8, dtype) for n_out in (1, 8191, 8192)] == ["gemv", "gemv", "lookup"]
    assert [choose_route(2, n_out, 256, 8, dtype) for n_out in (8192, 16384)] == ["gemv", "lookup"]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_long_codewords_are_decoded(dtype):
    assert choose_route(1, 8192, 256, 32, dtype) == "lookup"
    assert {choose_route(rows, 4096, 256, 33, dtype) for rows in (1, 8, 64, 999)} == {"decode"}


def test_what_is_served():
    x, codes = torch.zeros(2, 4), torch.zeros(3, 1).byte()
    assert [serves(dtype, x, codes) for dtype in (*HALVES, torch.float32)] == [True] * 3
    assert not serves(torch.float64, x, codes) and not serves(torch.float8_e5m2, x, codes)
    assert not serves(torch.float32, x, codes[:0]) and not serves(torch.float32, x[:, :0], codes)


def test_codes_are_copied_only_where_no_kernel_reads_them():
    for dtype in (torch.uint8, torch.int16, torch.int32):
        codes = torch.zeros(4, 4, dtype=dtype).t()
        assert pq_cuda.kernel_codes(codes) is codes
    assert pq_cuda.kernel_codes(torch.tensor([[300]])).dtype == torch.int32
