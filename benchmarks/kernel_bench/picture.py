"""The picture: how many times as fast as the baseline, against M."""

from __future__ import annotations

from pathlib import Path

from kernel_bench.report import Row

MODES = {"cpu": ("warm", "eager"), "cuda": ("cold", "graph")}  # in which variants are compared
TASKS = {"forward": "x @ W.T", "dx": "grad @ W", "dc": "codebook's gradient"}


def draw(rows: list[Row], device: str, path: Path) -> None:
    """Draw a panel for every size, a row of panels for every pass, and a line for every variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [row for row in rows if row["pass"] in TASKS and (row["cache"], row["mode"]) == MODES[device]]
    shown = [row for row in shown if row["ratio"]]
    sizes = list(dict.fromkeys((row["out"], row["in"]) for row in shown))
    tasks = [task for task in TASKS if any(row["pass"] == task for row in shown)]
    if not shown:
        return
    figure, axes = plt.subplots(
        len(tasks), len(sizes), figsize=(3.3 * len(sizes) + 2.2, 3.2 * len(tasks)), squeeze=False, sharex=True
    )
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for line, task in zip(axes, tasks, strict=True):
        names = list(dict.fromkeys(row["variant"] for row in shown if row["pass"] == task))
        for axis, size in zip(line, sizes, strict=True):
            own = [row for row in shown if (row["pass"], row["out"], row["in"]) == (task, *size)]
            for i, name in enumerate(names):
                points = sorted((row["M"], row["ratio"]) for row in own if row["variant"] == name)
                ours = name.startswith(("pq_", "packed")) and "+" not in name
                color = "black" if name == "dense" else plt.get_cmap("tab20")(2 * i % 20 + 2 * i // 20)
                style = {"color": color, "lw": 2.2 if ours else 1.1, "ls": "-" if ours else "--", "ms": 3}
                axis.plot(*zip(*points or [(float("nan"),) * 2], strict=True), marker="o", label=name, **style)
            axis.set_title(f"{TASKS[task]}, {size[0]} x {size[1]}", fontsize=9)
            axis.set(xscale="log", yscale="log", xticks=sorted({row["M"] for row in shown}))
            axis.tick_params(labelsize=7)
            axis.tick_params(which="minor", labelsize=6)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(plain)
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(plain)
            axis.yaxis.set_minor_formatter(NullFormatter())
        line[0].set_ylabel("times as fast as dense", fontsize=8)
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("M, rows of x", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
