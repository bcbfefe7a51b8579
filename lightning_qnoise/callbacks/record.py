"""What a model was before, between and after the stages: size and metrics, as a table and as checkpoint state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_qnoise.size_table import SizeTable, align


@dataclass
class Record:
    """Rows of size and metrics. `str()` of it is a table.

    Example:
        >>> record = Record()
        >>> record.add("float", SizeTable(()), {"val_acc": 0.5})
        >>> print(record)
               bytes  ratio  val_acc
        float      0   1.0x   0.5000
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, size: SizeTable, metrics: Mapping[str, float]) -> None:
        """Append a row, instead of an earlier one of the same name."""
        self.rows = [row for row in self.rows if row["name"] != name]
        self.rows.append({"name": name, "bytes": size.bytes, "ratio": size.compression, "metrics": dict(metrics)})

    def __str__(self) -> str:
        metrics = list(dict.fromkeys(metric for row in self.rows for metric in row["metrics"]))
        lines = [("", "bytes", "ratio", *metrics)]
        for row in self.rows:
            values = (f"{row['metrics'][m]:.4f}" if m in row["metrics"] else "" for m in metrics)
            lines.append((row["name"], f"{row['bytes']:,}", f"{row['ratio']:.1f}x", *values))
        return align(lines, n_left=1)
