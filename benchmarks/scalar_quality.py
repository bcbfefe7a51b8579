"""Integer weights and integer inputs of the layers on the two tasks of Table 1: bits by method, beside torchao.

`python benchmarks/scalar_quality.py --data <folder of data sets>` measures what is missing, cell by cell, and writes
`results/scalar_quality.csv` and `.png`. Interrupted, it goes on where it stopped. `--task`, `--cell` and `--seed`
choose a part, `--list` names the cells. Trained models are kept in `--work`; the float ones of table1.py serve as well.

W4A8 is 4-bit weights, a range in every row, and 8-bit inputs, whose range is found in every token (image: sample) or,
where a cell says "static", in 8 batches of training data. Ours quantize the embedding, too, unless a cell says
"linear". torchao quantizes linear layers by `quantize_`, with no 4-bit inputs, and convolutions by its
X86InductorQuantizer; 4-bit cells of that are its 8-bit ones with the limits of the codes narrowed. All train from
scratch for the same epochs, from the same initialization. torchao's bytes are counted from its tensors.

Every cell is measured once, and nothing is chosen on test data. Ranges are min-max: on training data (seed 0, of the
text a tenth left out) least squares was no better for weights, and for inputs hardly, at 48 times the work. torchao's
8-bit ranges are symmetric, but for its inputs under QAT, which has no other.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytorch_lightning as pl
import table1
import torch
from table1 import RESULTS, Base, Cell, _chosen, append, read
from tasks import TASKS
from torch import Tensor, nn

from lightning_qnoise import Int, quantize, save
from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.policy import Policy

FAIRSEQ = {"image": 85.9, "text": 67.8}  # its best 4-bit weights and activations
STYLES = {"PTQ": "0.3", "PTQ, gptq": "C2", "QAT": "C3", "Quant-Noise": "C0", "Quant-Noise, gptq": "C1"}
SCHEMES = {
    "W8A8": Int(8, activation=Int(8)),
    **{f"W8A8 static {r}": Int(8, activation=Int(8, mode="static", range=r)) for r in ("minmax", "mse", "histogram")},
    "W8A8 static symmetric": Int(8, symmetric=True, activation=Int(8, mode="static")),  # of the weights: the fastest
    "W4A8": Int(4, activation=Int(8)),
    "W4A4": Int(4, activation=Int(4)),
    "W8A8 linear": Int(8, activation=Int(8)),
    "W4A8 groups of 32, linear": Int(4, "group:32", activation=Int(8)),
}


@dataclass(frozen=True)
class Peer:
    """A cell of torchao: bits of weights and of inputs, and whether training is aware of them."""

    weight: int
    activation: int
    is_trained: bool


def _cells(task: Any) -> dict[str, Cell | Peer]:
    cells: dict[str, Cell | Peer] = {"float": Cell(Base())}
    is_text = task.name == "text"
    for name in (name for name in SCHEMES if is_text or "linear" not in name):
        cells[f"{name} PTQ"] = Cell(Base(), name)
        if name in ("W4A8", "W4A4"):
            cells[f"{name} PTQ, gptq"] = Cell(Base(), f"{name}, gptq")
            cells[f"{name} Quant-Noise, gptq"] = Cell(Base(name, 0.5), f"{name}, gptq")
        if "static" not in name:
            rates = {"QAT": 1.0} | ({"Quant-Noise": 0.5} if name != "W8A8 linear" else {})
            cells |= {f"{name} {method}": Cell(Base(name, rate), name) for method, rate in rates.items()}
    for method in ("PTQ", "QAT"):
        for weight, activation in ((8, 8), (4, 8)) if is_text else ((8, 8), (4, 8), (4, 4)):
            layers = ("groups of 32, linear" if weight == 4 else "linear") if is_text else "static"
            cells[f"torchao: W{weight}A{activation} {layers} {method}"] = Peer(weight, activation, method == "QAT")
    return cells


class Runner(table1.Runner):
    """Trains and measures the cells of one task and seed."""

    def run(self, name: str, cell: Cell | Peer) -> dict[str, Any]:
        if isinstance(cell, Cell):
            return super().run(name, cell)
        start = time.perf_counter()
        pl.seed_everything(self.seed, verbose=False)
        module = self.task.module() if cell.is_trained else self.base(Base())
        (self.export if self.task.name == "image" else self.swap)(module, cell)
        result = {"metric": round(self.test(module), 3), "bytes": _bytes(module.network, cell.weight)}
        spent = {"seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads()}
        return {"task": self.task.name, "cell": name, "seed": self.seed, "torch": torch.__version__} | result | spent

    def policy(self, name: str) -> Policy:
        name, is_gptq = name.removesuffix(", gptq"), name.endswith(", gptq")
        scheme = replace(SCHEMES[name], rounding="gptq") if is_gptq else SCHEMES[name]
        return {"*.embed_tokens": None, "*": scheme} if "linear" in name else scheme

    def compress(self, module: pl.LightningModule, cell: Cell, path: Path) -> None:
        quantize(module, self.policy(cell.policy), self.task.train_batches(self.seed).loader())
        torch.optim.swa_utils.update_bn(islice(self.task.train_batches(self.seed).loader(), 100), module)
        calibrate(module, self.task.train_batches(self.seed).loader())  # new statistics have moved the inputs
        save(module, path)

    def swap(self, module: pl.LightningModule, cell: Peer) -> None:
        """Quantize the linear layers by torchao."""
        from torchao import quantization as ao
        from torchao.quantization.qat import QATConfig

        if cell.weight == 4:
            config = ao.Int8DynamicActivationIntxWeightConfig(torch.int4, ao.granularity.PerGroup(32))
        elif cell.is_trained:
            config = ao.Int8DynamicActivationIntxWeightConfig(torch.int8, ao.granularity.PerAxis(0))
        else:
            config = ao.Int8DynamicActivationInt8WeightConfig()
        if cell.is_trained:
            ao.quantize_(module.network, QATConfig(config, step="prepare"))
            self.fit(module, [], offset=0, max_epochs=self.task.epochs)
            config = QATConfig(config, step="convert")
        ao.quantize_(module.network, config)

    def export(self, module: pl.LightningModule, cell: Peer) -> None:
        """Quantize the exported network by torchao."""
        from torchao.quantization import pt2e
        from torchao.quantization.pt2e import quantize_pt2e as steps
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        config = x86.get_default_x86_inductor_quantization_config(is_qat=cell.is_trained)
        inputs = replace(config.input_activation, quant_max=2**cell.activation - 1)
        weight = replace(config.weight, quant_min=-(2 ** (cell.weight - 1)), quant_max=2 ** (cell.weight - 1) - 1)
        config = replace(config, input_activation=inputs, output_activation=inputs, weight=weight)
        quantizer = x86.X86InductorQuantizer().set_global(config)
        batches = [x for x, _ in islice(self.task.train_batches(self.seed).loader(), 8)]
        sizes = ({0: torch.export.Dim("batch")},)
        network = torch.export.export(
            module.network.train(cell.is_trained), (batches[0],), dynamic_shapes=sizes
        ).module()
        prepared = (steps.prepare_qat_pt2e if cell.is_trained else steps.prepare_pt2e)(network, quantizer)
        module.network = pt2e.allow_exported_model_train_eval(prepared)
        if cell.is_trained:
            self.fit(module, [], offset=0, max_epochs=self.task.epochs)
        else:
            with torch.no_grad():
                for x in batches:
                    module(x)
        module.network = pt2e.allow_exported_model_train_eval(steps.convert_pt2e(module.network))


def _bytes(network: nn.Module, bits: int) -> int:
    """Bytes of the tensors that a network of torchao needs, with codes of `bits` bits."""
    from torchao.utils import TorchAOBaseTensor

    state = network.state_dict()
    if isinstance(network, torch.fx.GraphModule):  # which keeps float weights that nothing reads any more
        state = {node.target: state[node.target] for node in network.graph.nodes if node.op == "get_attr"}
    tensors: list[Tensor] = []
    for value in state.values():
        is_packed = isinstance(value, TorchAOBaseTensor)
        tensors += [getattr(value, name) for name in value.__tensor_flatten__()[0]] if is_packed else [value]
    # whole numbers are codes, or zero points of symmetric ranges, all zero, which need no place
    return sum(t.nbytes if t.is_floating_point() else bool(t.any()) * t.numel() * bits // 8 for t in tensors)


def report(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Print mean and spread over the seeds, and draw them beside the CSV file."""
    statistics: dict[str, dict[str, tuple[float, float]]] = {}
    for task, cell in ((name, cell) for name in TASKS for cell in _cells(TASKS[name])):
        group = [row for row in rows if (row["task"], row["cell"]) == (task, cell)]
        if group:
            values = [float(row["metric"]) for row in group]
            middle, spread = mean(values), stdev(values) if len(values) > 1 else 0.0
            statistics.setdefault(task, {})[cell] = middle, spread
            print(f"{task:6}{cell:46}{int(group[0]['bytes']):>10,}{middle:9.2f} +- {spread:.2f}  n={len(group)}")
    draw(statistics, path.with_suffix(".png"))


def draw(statistics: Mapping[str, Mapping[str, tuple[float, float]]], path: Path) -> None:
    """Draw one panel a task: quality by bits, ours filled, torchao hollow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(statistics), 4.8))
    axes = figure.subplots(1, len(statistics), squeeze=False)[0]
    for axis, (task, cells) in zip(axes, statistics.items(), strict=True):
        places: dict[str, list[str]] = {}
        for cell in cells:
            if cell == "float":
                axis.axhline(cells[cell][0], color="0.6", ls="--", zorder=0, label="float")
            else:
                places.setdefault(_bits(cell), []).append(cell)
        for place, names in enumerate(places.values()):
            axis.axvline(place + 0.5, color="0.9", lw=1, zorder=0)
            for i, cell in enumerate(names):
                method = max((method for method in STYLES if cell.endswith(method)), key=len)
                fill = "none" if cell.startswith("torchao") else STYLES[method]
                x = place + 0.8 * ((i + 0.5) / len(names) - 0.5)
                axis.errorbar(x, *cells[cell], fmt="o", color=STYLES[method], mfc=fill, capsize=2, ms=7)
        fairseq = {"W4A4": f"W4A4\n(fairseq: {FAIRSEQ[task]})"}
        labels = [fairseq.get(bits, bits.replace(", ", "\n").replace(" ", "\n", 1)) for bits in places]
        axis.set_xticks(range(len(places)), labels)
        axis.set(title=task, ylabel="top-1 %" if task == "image" else "perplexity", xlim=(-0.5, len(places) - 0.5))
    for method, colour in STYLES.items():
        axes[0].plot([], [], "o", color=colour, label=method)
    axes[0].plot([], [], "o", color="0.3", mfc="none", label="torchao")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=7)
    figure.savefig(path, dpi=120)


def _bits(cell: str) -> str:
    for method in sorted(STYLES, key=len, reverse=True):
        cell = cell.removesuffix(f" {method}")
    cell = cell.removeprefix("torchao: ")
    return "W8A8 static" if cell.startswith("W8A8 static") else cell.removesuffix(" static")


def main() -> None:
    """Measure what is missing, print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds fashion-mnist/ and wikitext-2/")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--cell", nargs="+", help="names as --list prints them, or parts of names")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("table1-work"), help="where trained models are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "scalar_quality.csv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    cells = {(t, c): cell for t in arguments.task for c, cell in _cells(TASKS[t]).items() if _chosen(c, arguments.cell)}
    if arguments.list:
        print("\n".join(f"{task}  {cell}" for task, cell in cells))
        return
    done = {(row["task"], row["cell"], int(row["seed"])) for row in read(arguments.out)}
    todo = [(*key, seed) for seed in arguments.seed for key in cells if (*key, seed) not in done]
    if todo and arguments.data is None:
        print(f"{len(todo)} cells are missing: pass --data to measure them")
        todo = []
    tasks = {name: TASKS[name](arguments.data, arguments.work) for name in {key[0] for key in todo}}
    for name, cell, seed in todo:
        row = Runner(tasks[name], seed, arguments.work).run(cell, cells[name, cell])
        append(arguments.out, row)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    report(read(arguments.out), arguments.out)


if __name__ == "__main__":
    main()
