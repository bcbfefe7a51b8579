"""What integer execution gains: the time of a model in float32 over that of the model packed as int8.

Large Linear layers, projections of self-attention and convolutions with quantized inputs run in integers, small ones in
floats (`set_memory(model, "fast")`), and on processors without VNNI instructions all of them. Of the "folded" convnet,
torch.fx folds every BatchNorm into a convolution before it is packed; the float32 model that it is compared with keeps
them, and the row "float32 folded" is that of the folded one in floats.

`python benchmarks/int8_speed.py` prints a row per model, batch and route and writes `results/int8_speed.csv` here.
On a CPU everything runs on one thread, and its processor time is counted; with `--device cuda` (`int8_speed_cuda.csv`)
it is the time until the GPU has finished. The models take turns, each with a few calls in a row of which the fastest
counts, as memory that the model before has given back must first be had again. A row holds the medians over the turns
and their ratio.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from lightning_qnoise import Int, quantize, set_memory
from lightning_qnoise.demos import DigitsClassifier, TransformerLM

CALLS = 7
ROUTES = {
    "weights only": None,
    "dynamic per token": Int(8),
    "dynamic per tensor": Int(8, per="tensor"),
    "static": Int(8, mode="static"),
}
FOLDED = "float32 folded"
PRESET = "ipq+int8"  # packed in one shot: product quantization with int8 codewords, dynamic per token


def packed(model: nn.Module, route: str, symmetric: bool, x: Tensor) -> nn.Module:
    """Return a packed copy: int8 weights, decoded once where they are not multiplied in integers."""
    model = copy.deepcopy(model)
    quantize(model, PRESET if route == PRESET else Int(8, symmetric=symmetric, activation=ROUTES[route]), [x])
    return set_memory(model, "fast")


def text_model() -> nn.Module:
    """The model of the text task."""
    sys.path.insert(0, str(Path(__file__).parent))
    from tasks.text import GPT

    return GPT()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "text task": (text_model, lambda n: torch.randint(0, 1024, (n, 64))),
    "shipped LM": (TransformerLM, lambda n: torch.randint(0, 1024, (n, 64))),
    "shipped convnet": (DigitsClassifier, lambda n: torch.randn(n, 1, 8, 8)),
    "folded convnet": (DigitsClassifier, lambda n: torch.randn(n, 1, 8, 8)),
    "Linear 4096": (lambda: nn.Sequential(nn.Linear(4096, 4096)), lambda n: torch.randn(n, 4096)),
    "wide convnet": (lambda: DigitsClassifier(width=64), lambda n: torch.randn(n, 1, 32, 32)),
}


def seconds(model: nn.Module, x: Tensor) -> float:
    """Return how long one call takes."""
    if not x.is_cuda:
        start = time.thread_time()
        model(x)
        return time.thread_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(x)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(models: dict[tuple[str, bool], nn.Module], x: Tensor, turns: int) -> dict[tuple[str, bool], float]:
    """Return the median milliseconds of each model over the turns, of the fastest call in each."""
    fastest = {key: [] for key in models}
    for _ in range(turns):
        for key, model in models.items():
            fastest[key].append(1000 * min(seconds(model, x) for _ in range(CALLS)))
    return {key: statistics.median(values) for key, values in fastest.items()}


@torch.inference_mode()
def measure(name: str, batch: int, turns: int, device: str = "cpu") -> list[dict[str, object]]:
    """Return a row per route."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, x = build().eval(), inputs(batch)
    source = fuse(model) if name.startswith("folded") else model
    keys = [(route, symmetric) for route in ROUTES for symmetric in (False, True)] + [(PRESET, False)]
    models = {("float32", False): model} | {key: packed(source, *key, x) for key in keys}
    if source is not model:
        models[FOLDED, False] = source
        keys.append((FOLDED, False))
    ms = in_turns({key: model.to(device) for key, model in models.items()}, x.to(device), turns)
    reference = ms[("float32", False)]
    return [
        {
            "model": name,
            "batch": batch,
            "route": route,
            "weight": "float32" if route == FOLDED else "symmetric" if symmetric else "asymmetric",
            "ms": round(ms[route, symmetric], 3),
            "fp32_ms": round(reference, 3),
            "ratio": round(reference / ms[route, symmetric], 2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        for route, symmetric in keys
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="int8_speed.csv, or int8_speed_cuda.csv, in results")
    arguments = parser.parse_args()
    name = "int8_speed.csv" if arguments.device == "cpu" else "int8_speed_cuda.csv"
    out = arguments.out or Path(__file__).parent / "results" / name
    torch.set_num_threads(1)
    rows = []
    for name in arguments.models:
        for batch in arguments.batches:
            for row in measure(name, batch, arguments.turns, arguments.device):
                print(*row.values(), sep="  ", flush=True)
                rows.append(row)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
