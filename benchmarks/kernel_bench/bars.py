"""The bars that the operators have to clear, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kernel_bench.picture import MODES
from kernel_bench.report import Row

Value = tuple[float, Row]
BIG, BIGGEST = (4096, 4096), (8192, 8192)


def bars(rows: list[Row], device: str) -> list[str]:
    """Return a line for every bar of the device: met, missed with the worst value, or not measured."""
    return on_gpu(rows) if device == "cuda" else on_cpu(rows)


def on_cpu(rows: list[Row]) -> list[str]:
    """The bars of one core of a CPU."""

    def ratios(variant: str, fits: Callable[[Row], bool] = lambda row: True) -> list[Value]:
        return _ratios(rows, "cpu", variant, fits)

    lean = [row for row in rows if row["variant"] == "packed Linear, lean" and _size(row) == BIG]
    copies = [(float(row["peak_MiB"]) * 2**20 / (4 * BIG[0] * BIG[1]), row) for row in lean]
    few = ratios("packed Linear, lean", lambda row: _size(row) == BIG and 4 <= row["M"] <= 16)
    return [
        _least("fast layer never below 0.9x", ratios("packed Linear, fast"), 0.9),
        _least("lean layer at 4096x4096, M = 4 to 16, at least 1.5x", few, 1.5),
        _most("lean layer at 4096x4096 takes at most half a dense copy", copies, 0.5),
        _least("k-means assignment at least 3x matmul + argmin", ratios("kmeans_assign"), 3),
    ]


def on_gpu(rows: list[Row]) -> list[str]:
    """The bars of a GPU."""

    def ratios(fits: Callable[[Row], bool]) -> list[Value]:
        return _ratios(rows, "cuda", "pq_linear", fits)

    large = [size for size in {_size(row) for row in rows} if size[0] * size[1] >= BIG[0] * BIG[1]]
    layer = [(float(row["memory_over_file"]), row) for row in rows if row["variant"] == "packed Linear, lean"]
    return [
        _least("M = 1 at 8192x8192 at least 4x", ratios(lambda row: row["M"] == 1 and _size(row) == BIGGEST), 4),
        _least("M = 1 at 4096x4096 at least 2.5x", ratios(lambda row: row["M"] == 1 and _size(row) == BIG), 2.5),
        _least("M = 16 from 4096x4096 on at least 1.5x", ratios(lambda r: r["M"] == 16 and _size(r) in large), 1.5),
        _least("M >= 512 never below 0.9x", ratios(lambda row: row["M"] >= 512), 0.9),
        _least("faster than AQLM CUDA 1x8 at M = 1", _against(rows, "AQLM CUDA 1x8", lambda row: row["M"] == 1), 1),
        _least("faster than AQLM Triton everywhere", _against(rows, "AQLM Triton", lambda row: True), 1),
        _most("packed Linear at M = 1 takes at most 1.2x its file", layer, 1.2),
    ]


def _size(row: Row) -> tuple[int, int]:
    return row["out"], row["in"]  # type: ignore[return-value]


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("pass", "out", "in", "M", "dtype", "cache", "mode"))


def _ratios(rows: list[Row], device: str, variant: str, fits: Callable[[Row], bool]) -> list[Value]:
    own = (row for row in rows if row["variant"] == variant and (row["cache"], row["mode"]) == MODES[device])
    return [(float(row["ratio"]), row) for row in own if row["ratio"] and fits(row)]  # type: ignore[arg-type]


def _against(rows: list[Row], peer: str, fits: Callable[[Row], bool]) -> list[Value]:
    """How many times as fast as a peer the operator is, cold: in a graph, or in eager mode where the peer has none."""
    ours = {_key(row): float(row["us"]) for row in rows if row["variant"] == "pq_linear"}  # type: ignore[arg-type]
    theirs = [row for row in rows if row["variant"] == peer and row["pass"] == "forward" and row["cache"] == "cold"]
    in_graphs = {_key(row)[:5] for row in theirs if row["mode"] == "graph"}
    theirs = [row for row in theirs if row["mode"] == "graph" or _key(row)[:5] not in in_graphs]
    return [(float(row["us"]) / ours[_key(row)], row) for row in theirs if _key(row) in ours and fits(row)]


def _least(text: str, values: Iterable[Value], limit: float) -> str:
    return _verdict(text, sorted(values, key=lambda value: value[0]), lambda value: value >= limit)


def _most(text: str, values: Iterable[Value], limit: float) -> str:
    return _verdict(text, sorted(values, key=lambda value: -value[0]), lambda value: value <= limit)


def _verdict(text: str, worst_first: list[Value], meets: Callable[[float], bool]) -> str:
    if not worst_first:
        return f"{text}: not measured"
    value, row = worst_first[0]
    where = f"{value:.2f} at {row['out']}x{row['in']}, M = {row['M']}, {row['dtype']}"
    missed = sum(not meets(value) for value, _ in worst_first)
    return f"{text}: met, worst {where}" if not missed else f"{text}: missed {missed} of {len(worst_first)}: {where}"
