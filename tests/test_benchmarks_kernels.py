"""`benchmarks/kernels.py` on tiny matrices: what it reports, and that it refuses what is wrong."""

import csv
import importlib.util
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = ["--device", "cpu", "--sizes", "64x128", "--turns", "1"]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; its helpers are imported anew, and gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_kernels", BENCHMARKS / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "kernel_bench"]:
        del sys.modules[name]


def part(name):
    return importlib.import_module(f"kernel_bench.{name}")


def run(bench, *arguments):
    """The exit status and the rows."""
    status = bench.main([*SIZE, "--out", "out.csv", *arguments])
    with open("out.csv", newline="") as file:
        return status, list(csv.DictReader(file))


def test_every_variant_has_a_row(bench, capsys):
    status, rows = run(bench, "--rows", "1", "3")
    assert status == 0 and Path("out.png").stat().st_size > 10_000
    found = {(row["pass"], row["M"], row["variant"]) for row in rows}
    variants = {"dense", "pq_linear", "route decode", "route lookup", "route gather", "pq_decode + linear"}
    variants |= {"packed Linear, lean", "packed Linear, fast", "int8 weight-only (torch)", "int4 weight-only (torch)"}
    assert {("forward", m, name) for m in "13" for name in variants} <= found
    assert {("dx", "3", "pq_input_grad"), ("dc", "3", "pq_codebook_grad"), ("assign", "1024", "kmeans_assign")} <= found
    for row in rows:
        assert float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"]) and float(row["ratio"]) > 0
        assert float(row["ratio"]) == 1 or row["variant"] not in ("dense", "matmul + argmin")
    by_name = {row["variant"]: row for row in rows if (row["pass"], row["M"]) == ("forward", "3")}
    moved = 3 * (64 + 128) * 4
    assert int(by_name["dense"]["bytes"]) == 64 * 128 * 4 + moved
    assert int(by_name["pq_linear"]["bytes"]) == 64 * 16 + 256 * 8 * 4 + moved
    assert int(by_name["int4 weight-only (torch)"]["bytes"]) == 64 * 128 // 2 + 64 * 4 + moved // 2
    lean, fast = (float(by_name[f"packed Linear, {memory}"]["memory_over_file"]) for memory in ("lean", "fast"))
    assert 1 < lean and lean + 2 < fast  # the dense copy is 3.5 times the file
    told = capsys.readouterr().out
    assert "not run  forward 64x128 M=1 float32  AQLM CUDA 1x8: needs a GPU" in told
    assert "lean layer at 4096x4096 takes at most half a dense copy: not measured" in told


def scaled(y):
    return y * 1.001


def last_column_missing(y):
    new = torch.empty_like(y)
    new[..., :-1] = y[..., :-1]
    return new


def never_written(y):
    new = torch.empty_like(y)
    return new if new.isnan().all() else y  # where memory holds the right result of the call before


def raises(y):
    raise RuntimeError("out of registers")


@pytest.mark.parametrize("fault", [scaled, last_column_missing, never_written, raises])
@pytest.mark.parametrize(
    ("task", "name"), [("forward", "pq_linear"), ("dx", "pq_input_grad"), ("dc", "pq_codebook_grad")]
)
def test_a_wrong_result_is_not_reported(bench, monkeypatch, capsys, fault, task, name):
    right = getattr(torch.ops.lightning_qnoise, name)
    others = types.SimpleNamespace(pq_decode=torch.ops.lightning_qnoise.pq_decode)
    setattr(others, name, lambda *args: fault(right(*args)))
    monkeypatch.setattr(part("cases"), "OPS", others)
    status, rows = run(bench, "--rows", "3", "--passes", task)
    assert status == 1 and "dense" in {row["variant"] for row in rows}
    assert name not in {row["variant"] for row in rows}
    assert f"RED  {task} 64x128 M=3 float32  {name}: " in capsys.readouterr().out


@pytest.mark.parametrize("codes", [lambda codes: codes.roll(1), torch.empty_like])
def test_a_wrong_assignment_is_not_reported(bench, monkeypatch, codes):
    right = torch.ops.lightning_qnoise.kmeans_assign

    def wrong(points, centroids):
        found, distances = right(points, centroids)
        return codes(found), distances

    monkeypatch.setattr(part("cases"), "OPS", types.SimpleNamespace(kmeans_assign=wrong))
    status, rows = run(bench, "--passes", "assign")
    assert status == 1 and [row["variant"] for row in rows] == ["matmul + argmin"]


def test_it_stops_in_time(bench, capsys):
    assert bench.main([*SIZE, "--out", "out.csv", "--budget", "-1"]) == 0
    assert "cases were not run" in capsys.readouterr().out and not Path("out.csv").exists()


@pytest.mark.parametrize("size", ["64x12", "64", "0x8"])
def test_a_size_that_has_no_blocks_is_refused(bench, size):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--sizes", size])


def test_a_peer_that_refuses_or_takes_too_long_is_named(bench, monkeypatch, capsys):
    def slow(weights, x):
        time.sleep(5)

    def refusing(weights, x):
        raise ValueError("takes squares only")

    def wrong(weights, x):
        return part("peers").replace(part("peers").int8(weights, x), expected=lambda i: torch.ones(len(x), 64))

    monkeypatch.setattr(part("run"), "PEER_SECONDS", 0.2)
    monkeypatch.setattr(part("peers"), "FORWARD", {"slow": slow, "refusing": refusing, "wrong": wrong})
    status, rows = run(bench, "--rows", "1", "2", "--passes", "forward")
    told = capsys.readouterr().out
    assert status == 1 and not {"slow", "refusing", "int8 weight-only (torch)"} & {row["variant"] for row in rows}
    assert told.count("slow: not ready after") == 1 and told.count("ValueError: takes squares only") == 2
    assert told.count("wrong: relative error") == 2


def test_aqlm_gets_the_same_matrix(bench, monkeypatch):
    def kernel(x, codes, codebooks, scales, bias):  # as AQLM defines them
        (n_codebooks, k), index = codebooks.shape[:2], codes.long() % 256
        assert codes.dtype == torch.int8 and (n_codebooks, k) == (1, 256) and bias is None
        weight = F.embedding(index[..., 0], codebooks[0, :, 0]) * scales[:, :, 0]
        return x @ weight.flatten(1).t()

    monkeypatch.setattr(part("peers"), "version", lambda name: "1.1.7")
    weights = part("cases").Weights(64, 128, torch.float32, "cpu", rotated=3 * 1024)
    x = weights.random(5, 128)
    variant = part("peers")._aqlm("AQLM", kernel, weights, x, lambda i: x.double() @ weights.matrix(i).t())
    assert len(variant.calls) == 3 and variant.detail == "1.1.7"
    assert part("variants").fault_of(variant) == ""


def test_slow_and_quick_calls_are_both_repeated(bench, monkeypatch):
    timers, counts = part("timers"), {"slow": 0, "quick": 0}
    monkeypatch.setattr(timers, "_thread_seconds", lambda call: call())

    def variant(name, seconds):
        def call():
            counts[name] += 1
            return seconds + 1 / counts[name]

        return part("variants").Variant(name, [call], None, 0)

    slow, quick = timers.CpuTimer().measure([variant("slow", 0.1), variant("quick", -1.0)], 1)
    assert counts == {"slow": 3, "quick": 20}
    assert slow.us == [1e6 * (0.1 + 1 / 3)] and quick.us == [1e6 * (-1 + 1 / 20)]


def row(m, variant, ratio, us=1.0, size=(4096, 4096), mode="graph", **more):
    keys = {"pass": "forward", "out": size[0], "in": size[1], "M": m, "dtype": "float16", "cache": "cold", "mode": mode}
    return keys | {"variant": variant, "ratio": ratio, "us": us} | more


def test_bars_of_a_gpu(bench):
    rows = [row(1, "pq_linear", 2.6), row(16, "pq_linear", 1.4), row(512, "pq_linear", 0.95)]
    rows += [row(1, "AQLM CUDA 1x8", 2.0, us=0.9), row(1, "AQLM Triton", 0.5, us=4.0)]
    rows += [row(512, "AQLM Triton", "", us=9.0, mode="eager"), row(512, "pq_linear", "", us=2.0, mode="eager")]
    rows += [row(1, "packed Linear, lean", 2.0, memory_over_file=1.3)]
    assert [line.split(": ", 1)[1].split(" at ")[0] for line in part("bars").bars(rows, "cuda")] == [
        "not measured",
        "met, worst 2.60",
        "missed 1 of 1: 1.40",
        "met, worst 0.95",
        "missed 1 of 1: 0.90",
        "met, worst 4.00",
        "missed 1 of 1: 1.30",
    ]


class Recorder(TorchDispatchMode):
    """Keeps what is computed, to compute it again to the same place."""

    def __init__(self):
        super().__init__()
        self.jobs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.jobs.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.jobs:
            new = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.data_ptr() != new.data_ptr():
                out.copy_(new)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.ms = 1000 * time.perf_counter()

    def elapsed_time(self, other):
        return other.ms - self.ms


@pytest.fixture
def cuda(bench, monkeypatch):
    """The timer of a GPU with CUDA's parts played by the CPU, and a cache that twelve tiny weights fill four times."""

    @contextmanager
    def graph(found, stream):
        with Recorder() as recorder:
            yield
        found.replay, found.jobs = recorder.replay, recorder.jobs

    @contextmanager
    def nothing(*args):
        yield types.SimpleNamespace(wait_stream=lambda other: None)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    parts = {"CUDAGraph": types.SimpleNamespace, "graph": graph, "Event": Event, "Stream": lambda: stream}
    parts |= {"stream": nothing, "current_stream": lambda: stream, "synchronize": lambda: None}
    parts |= {"memory_allocated": lambda: 2, "max_memory_allocated": lambda: 7, "reset_peak_memory_stats": lambda: None}
    parts |= {"get_device_properties": lambda: types.SimpleNamespace(L2_cache_size=3 * 64 * 16)}
    for name, value in parts.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(part("cuda_timer"), "GRAPH_CALLS", 20)
    monkeypatch.setattr(part("cuda_timer"), "GRAPH_LONGEST", 60.0)
    return part("cuda_timer").CudaTimer()


def test_graphs_go_through_all_copies(cuda):
    weights = part("cases").Weights(64, 128, torch.float32, "cpu", cuda.rotated())
    assert len(weights.codes) == 12
    seen = []
    variant = part("cases").forward(weights, weights.random(2, 128))[1]
    calls = [lambda i=i, call=call: (seen.append(i), call())[1] for i, call in enumerate(variant.calls)]
    found = cuda.measure([part("peers").replace(variant, calls=calls)], 4)
    assert [(timed.cache, timed.mode, timed.fault, timed.reason) for timed in found] == [
        ("cold", "graph", "", ""),
        ("warm", "graph", "", ""),
        ("cold", "eager", "", ""),
    ]
    assert [len(timed.us) for timed in found][::2] == [4, 3] and all(us > 0 for timed in found for us in timed.us)
    first = 1 + 3 * 3  # calls that tell how long one takes
    whole = seen[first : first + 24]  # 20 calls, rounded up
    assert whole == [*range(12)] * 2 and seen[first + 24 : first + 44] == [0] * 20


def test_a_graph_that_does_not_write_is_refused(cuda):
    weights = part("cases").Weights(64, 128, torch.float32, "cpu", cuda.rotated())
    variant = part("cases").forward(weights, weights.random(2, 128))[1]
    kept = [call() for call in variant.calls]
    stale = part("peers").replace(variant, calls=[lambda y=y: y for y in kept])  # right, but nothing is computed
    faults = [timed.fault for timed in cuda.measure([stale], 4)]
    assert faults[0] and faults[1]


def test_a_case_on_the_gpu_has_rows_in_three_modes(cuda):
    report = part("report").Report("cpu", Path("out.csv"))
    bench = part("run").Bench(cuda, report, 2)
    weights = part("cases").Weights(64, 128, torch.float32, "cpu", cuda.rotated())
    bench.run(part("cases").Case("forward", 64, 128, 1, torch.float32), weights)
    modes = {(row["cache"], row["mode"]) for row in report.rows if row["variant"] == "pq_linear"}
    assert report.reds == 0 and modes == {("cold", "graph"), ("warm", "graph"), ("cold", "eager")}
    assert {row["cache"] for row in report.rows if row["variant"] == "packed Linear, lean"} == {"warm"}
    assert all(row["ratio"] for row in report.rows if row["mode"] == "graph")
