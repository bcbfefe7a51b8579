"""A model's size as data and as text: one entry a stored weight, one row a layer. 1 MB is 10^6 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_qnoise.schemes import Scheme


@dataclass(frozen=True)
class Entry:
    """One stored weight or buffer: its name, bytes as float and as stored, and the scheme (None: kept float)."""

    name: str
    float_bytes: int
    bytes: int
    scheme: Scheme | None = None


@dataclass(frozen=True)
class SizeTable:
    """The size of a model, weight by weight. `str()` of it is a table with one row a layer."""

    entries: Sequence[Entry]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def float_bytes(self) -> int:
        """Bytes of all tensors before compression."""
        return sum(entry.float_bytes for entry in self.entries)

    @property
    def total_mb(self) -> float:
        """Megabytes (10^6 bytes) as stored."""
        return self.bytes / 1e6

    @property
    def compression(self) -> float:
        """How many times smaller than float."""
        return self.float_bytes / self.bytes if self.bytes else 1.0

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged: `size/total_mb` and `size/compression`."""
        return {"size/total_mb": self.total_mb, "size/compression": self.compression}

    def layers(self) -> dict[str, Entry]:
        """Return one entry a layer, in the model's order."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.name.rpartition(".")[0], []).append(entry)
        return {layer: _sum(layer, group) for layer, group in groups.items()}

    def __str__(self) -> str:
        rows = [("layer", "scheme", "float bytes", "bytes", "ratio")]
        for layer, entry in self.layers().items():
            rows.append((layer or "(model)", str(entry.scheme or "float"), *_numbers(entry)))
        total = _sum("total", self.entries)
        rows.append((total.name, f"{self.total_mb:.3f} MB", *_numbers(total)))
        return align(rows)


def _sum(name: str, entries: Sequence[Entry]) -> Entry:
    scheme = next((entry.scheme for entry in entries if entry.scheme), None)
    return Entry(name, sum(e.float_bytes for e in entries), sum(e.bytes for e in entries), scheme)


def _numbers(entry: Entry) -> tuple[str, str, str]:
    ratio = f"{entry.float_bytes / entry.bytes:.1f}x" if entry.bytes else "-"
    return f"{entry.float_bytes:,}", f"{entry.bytes:,}", ratio


def align(rows: Sequence[Sequence[str]], n_left: int = 2) -> str:
    """Return rows of text as a table, the first `n_left` columns flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.ljust(w) if i < n_left else c.rjust(w) for i, (c, w) in padded).rstrip())
    return "\n".join(lines)
