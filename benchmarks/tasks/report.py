"""Mean and spread over the seeds, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

REFERENCE = {  # baselines of fairseq's own code: same model, data, epochs and steps; mean of two seeds
    "image": {"L: iPQ from float": 88.86, "L: iPQ from Quant-Noise": 88.92, "L: iPQ from QAT": 86.06}
    | {"S: iPQ from float": 87.62, "S: iPQ from Quant-Noise": 88.22, "S: iPQ from QAT": 84.81}
    | {"L: PQ one shot from float": 43.64, "L: PQ one shot from Quant-Noise": 40.27, "float": 89.07}
    | {"S: PQ one shot from float": 13.95, "float, same extra steps": 89.38},
    "text": {"L: iPQ from float": 64.08, "L: iPQ from Quant-Noise": 64.16, "L: iPQ from QAT": 208.89}
    | {"S: iPQ from float": 72.03, "S: iPQ from Quant-Noise": 71.90, "L: PQ one shot from float": 69.38}
    | {"S: PQ one shot from float": 83.88, "float": 60.20, "float, same extra steps": 58.37},
}


def report(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Print a table of all rows and draw quality against bytes beside the CSV file."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["cell"]), []).append(row)
    for (task, cell), group in groups.items():
        values = [float(row["metric"]) for row in group]
        spread = f"{stdev(values):.2f}" if len(values) > 1 else "-"
        reference = REFERENCE.get(task, {}).get(cell)
        theirs = f"{reference:9.2f}" if reference else " " * 9
        print(
            f"{task:6}{cell:46}{int(group[0]['bytes']):>10,}{mean(values):9.2f} +- {spread:6}{theirs}  n={len(values)}"
        )
    draw(groups, path.with_suffix(".png"))


def draw(groups: dict[tuple[str, str], list[dict[str, str]]], path: Path) -> None:
    """Draw one panel a task: every cell at its bytes, ours filled, the reference hollow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    tasks = list(dict.fromkeys(task for task, _ in groups))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for (owner, cell), group in groups.items():
            value, size = mean(float(row["metric"]) for row in group), int(group[0]["bytes"]) / 1e3
            if owner != task or ("iPQ" not in cell and "int" not in cell and cell != "float"):
                continue
            colour = "C0" if "Quant-Noise" in cell or "noise" in cell else "C3" if "QAT" in cell else "0.3"
            axis.plot(size, value, "o", color=colour)
            reference = REFERENCE.get(task, {}).get(cell)
            if reference:
                axis.plot(size, reference, "o", mfc="none", color=colour)
        axis.set(xscale="log", xlabel="kilobytes", title=task, ylabel="top-1 %" if task == "image" else "perplexity")
        axis.xaxis.set_minor_formatter(NullFormatter())
        if task == "text":
            axis.set_yscale("log")
    for label, colour, fill in (
        ("float, PTQ", "0.3", "0.3"),
        ("QAT", "C3", "C3"),
        ("Quant-Noise", "C0", "C0"),
        ("fairseq's code", "0.3", "none"),
    ):
        axes[0][0].plot([], [], "o", color=colour, mfc=fill, label=label)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
