"""The kernels in triton's interpreter and compiled for GPUs that need not be there.

Each run is a process of its own: triton reads TRITON_INTERPRET when a kernel is defined, once and for all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED_MEMORY = {"80": 163 * 1024, "90": 227 * 1024}  # bytes that a program can have

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


def run(*args, cache, **env):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent)]), "TRITON_CACHE_DIR": str(cache)}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON", "PYTEST"))}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env={**kept, **paths, **env}, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("cases", sorted(HERE.glob("*_cases.py")), ids=lambda path: path.stem)
def test_interpreted(cases, tmp_path):
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cases, cache=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_gpu_is_needed_without_the_interpreter(tmp_path):
    code = (
        "from kernels.random_weights import random_weight\n"
        "from lightning_qnoise.kernels.decode import pq_decode\n"
        "pq_decode(*random_weight().args)"
    )
    done = run("-c", code, cache=tmp_path)
    assert "ValueError: a Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1" in done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Registers, memory and instructions of each launch, compiled for sm_80 and sm_90."""
    done = run(HERE / "aot.py", cache=tmp_path_factory.mktemp("triton"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for label, by_arch in found.items():
        for arch, used in by_arch.items():
            print(f"{label} sm_{arch}: {used}")
    return found


def test_nothing_spills(compiled):
    """No stack and no local memory, by the resource usage and by the instructions; shared memory within the limit."""
    for label, by_arch in compiled.items():
        assert set(by_arch) == set(SHARED_MEMORY)
        for arch, used in by_arch.items():
            assert used["STACK"] == used["LOCAL"] == 0, (label, arch)
            assert not {"LDL", "STL"} & {kind.split(".")[0] for kind in used["instructions"]}, (label, arch)
            assert used["SHARED"] <= SHARED_MEMORY[arch], (label, arch)


@pytest.mark.parametrize(
    "label", ["decode", "embedding", "gemv M=1", "gemv M=4", "gemv M=4 odd", "gemm M=16", "gemm M=128"]
)
def test_a_row_of_the_codebook_is_one_load(compiled, label):
    """16 bytes at K = 256, d = 8 in float16, through the L1 cache: no asynchronous copy, which would bypass it."""
    for used in compiled[label].values():
        assert "LDG.128" in used["instructions"]
        assert not [kind for kind in used["instructions"] if kind.startswith("LDGSTS")]


@pytest.mark.parametrize(
    ("label", "loads"),
    [
        ("gemv M=4, table: lookup_kernel", {"LDG.128", "LDG"}),  # 16 codes, one entry of the table
        ("gemv M=1, tall table: lookup_kernel", {"LDG.128", "LDG"}),
        ("gemv M=4, table words: lookup_kernel", {"LDG"}),
        ("gemv M=4, table int16: lookup_kernel", {"LDG.64", "LDG"}),
        ("gemv M=4, table: table_kernel", {"LDG.128"}),
        ("gemv M=1", {"LDG.128"}),  # codes, codebook and x
        ("gemv M=4", {"LDG.128"}),
        ("gemv M=4 fp32", {"LDG.128"}),
        ("gemv M=4 words", {"LDG.128", "LDG"}),
        ("gemv M=4 odd", {"LDG.128", "LDG.U8"}),
    ],
)
def test_codes_are_read_by_wide_loads(compiled, label, loads):
    for used in compiled[label].values():
        assert {kind for kind in used["instructions"] if kind.startswith("LDG")} == loads


@pytest.mark.parametrize("rows", [16, 128])
def test_the_product_runs_on_tensor_cores(compiled, rows):
    """By mma on sm_80 and by wgmma on sm_90, 64 outputs and all the rows of x (at most) in one instruction."""
    kinds = {arch: used["instructions"] for arch, used in compiled[f"gemm M={rows}"].items()}
    assert any(kind.startswith("HMMA") for kind in kinds["80"])
    assert f"HGMMA.64x{rows}x16" in kinds["90"]


def test_no_lane_waits_for_another(compiled):
    """Where a lane has an output of its own, or neighbouring ones a row, nothing goes through shared memory."""
    labels = [label for label in compiled if label.startswith("gemv")]
    for label in [*labels, "decode", "decode int16", "embedding"]:
        assert {used["SHARED"] for used in compiled[label].values()} == {0}, label


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["M=16 float16", "M=128 float16", "M=128 bfloat16"])
def test_integers_are_copied_asynchronously_and_multiplied_on_tensor_cores(compiled, bits, case):
    rows = case.split()[0].removeprefix("M=")
    kinds = {arch: used["instructions"] for arch, used in compiled[f"int{bits} {case}"].items()}
    assert any(kind.startswith("HMMA") for kind in kinds["80"])
    assert f"HGMMA.64x{rows}x16" in kinds["90"]
    for found in kinds.values():  # codes and inputs; a zero point is a byte, and scales are float32
        assert {"LDGSTS.128"} <= set(found) or {"LDGSTS.64"} <= set(found)
        assert {kind for kind in found if kind.startswith("LDG") and "STS" not in kind} <= {"LDG", "LDG.U8"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["int", "clamped int", "grouped int", "int gradient", "pq", "mean", "zero"])
def test_noise_reads_and_writes_16_bytes_at_once(compiled, name, dtype):
    for used in compiled[f"noise {name} {dtype}"].values():
        assert {"LDG.128", "STG.128"} <= set(used["instructions"])
        assert not [kind for kind in used["instructions"] if kind.startswith("STG") and kind != "STG.128"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["int", "clamped int", "grouped int"])
def test_noise_rounds_by_adding_and_subtracting(compiled, name, dtype):
    """Neither is folded away, and no mask goes through shared memory."""
    for used in compiled[f"noise {name} {dtype}"].values():
        assert used["halves"] == 2 * 2048 // 128  # for each of a thread's elements
        assert used["SHARED"] == 0
