"""ONNX files of packed models in ONNX Runtime on the CPU: bytes, error of the logits, latency.

`python benchmarks/onnx_export.py` exports the two models of the comparison, with random weights, in float32, as static
int8 and with PQ weights, runs them in alternation on one thread, and writes `results/onnx_export.csv` here. The error
is the largest over the logits, in units of the largest logit, against the packed model in torch; that of quantization
is the packed model against the float model. The ratio is the median over rounds of the time over that of float32.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import torch
from tasks.image import Image, ResNet
from tasks.text import GPT, VOCABULARY, Text
from torch import Tensor, nn

from lightning_qnoise import Int, quantize, size_table
from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.export import export_onnx
from lightning_qnoise.policy import Policy

STATIC = Int(8, symmetric=True, activation=Int(8, mode="static"))
BATCHES = (1, 16)


class ConvNet(nn.Sequential):
    """Convolution, norm and ReLU, eight times: no sums between convolutions."""

    def __init__(self, width: int = 64) -> None:
        blocks: list[nn.Module] = []
        for n_in, stride in ((1, 2), *[(width, 1)] * 3, (width, 2), *[(width, 1)] * 3):
            blocks += [nn.Conv2d(n_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def unprefixed(policy: dict) -> dict:
    """The policy of a task's module for the network alone."""
    return {name.removeprefix("network."): scheme for name, scheme in policy.items()}


def images(n: int) -> Tensor:
    """Random images, float32 `[n, 1, 28, 28]`."""
    return torch.randn(n, 1, 28, 28)


def tokens(n: int) -> Tensor:
    """Random ids, int64 `[n, 64]`."""
    return torch.randint(VOCABULARY, (n, 64))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], Policy]] = {
    "image": (ResNet, images, unprefixed(Image.pq("L"))),
    "text": (GPT, tokens, unprefixed(Text.pq("L"))),
    "plain convolutions": (ConvNet, images, "pq"),
    "image, 4 x as wide": (lambda: ResNet((128, 256, 512)), images, unprefixed(Image.pq("L"))),
    "text, 4 x as wide": (lambda: GPT(512, heads=16), tokens, unprefixed(Text.pq("L"))),
}


def build(make: Callable[[], nn.Module], draw: Callable[[int], Tensor], policy: Policy | None) -> nn.Module:
    """The model with random weights, the same each time, and statistics in its norms; quantized and calibrated."""
    torch.manual_seed(0)
    model = make()
    x = draw(32)
    with torch.no_grad():
        for _ in range(20):
            model(x)
    model.eval()
    return model if policy is None else calibrate(quantize(model, policy), [(x, x)], batches=1)


def session(path: str) -> ort.InferenceSession:
    """One thread, all optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(runtime: ort.InferenceSession, x: Tensor, at_least: float = 0.02) -> float:
    """Seconds of one run, from as many as fill `at_least`."""
    inputs = {runtime.get_inputs()[0].name: x.numpy()}
    start, n_runs = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < at_least or not n_runs:
        runtime.run(None, inputs)
        n_runs += 1
    return spent / n_runs


def measure(name: str, folder: str, rounds: int) -> list[dict[str, object]]:
    """A row per variant and batch size."""
    make, draw, pq = MODELS[name]
    policies: dict[str, Policy | None] = {"float32": None, "static int8": {"*": STATIC}, "PQ": pq}
    rows, runtimes, x = {}, {}, draw(16)
    full = build(make, draw, None)
    for variant, policy in policies.items():
        model, path = build(make, draw, policy), f"{folder}/{variant}.onnx"
        n_bytes = export_onnx(model, (x,), path, dynamic_shapes=({0: torch.export.Dim("batch")},))
        runtimes[variant] = session(path)
        with torch.no_grad():
            ours, exact = model(x), full(x)
        theirs = torch.from_numpy(runtimes[variant].run(None, {runtimes[variant].get_inputs()[0].name: x.numpy()})[0])
        rows[variant] = {
            "file_bytes": n_bytes,
            "table_bytes": size_table(model).bytes,
            "error": f"{(theirs - ours).abs().max() / ours.abs().max():.1e}",
            "mean_error": f"{(theirs - ours).abs().mean() / ours.abs().max():.1e}",
            "quantization_error": f"{(exact - ours).abs().max() / exact.abs().max():.1e}",
        }
    return [row for batch in BATCHES for row in timed(name, rows, runtimes, x[:batch], rounds)]


def timed(
    name: str, rows: dict[str, dict], runtimes: dict[str, ort.InferenceSession], x: Tensor, rounds: int
) -> list[dict[str, object]]:
    """The rows, with what one batch takes."""
    spent: dict[str, list[float]] = {variant: [] for variant in rows}
    for _ in range(rounds):
        for variant, runtime in runtimes.items():
            spent[variant].append(seconds(runtime, x))
    return [
        {
            "model": name,
            "variant": variant,
            **row,
            "batch": len(x),
            "ms": round(1e3 * statistics.median(spent[variant]), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(spent[variant], spent["float32"], strict=True)), 3),
            "rounds": rounds,
            "threads": 1,
            "onnxruntime": ort.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        for variant, row in rows.items()
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_export.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            for row in measure(name, folder, arguments.rounds):
                rows.append(row)
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
