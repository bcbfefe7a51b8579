"""What a model was before, between and after the stages: size and metrics, as a table and as checkpoint state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_qnoise.callbacks.base import LightningModule, Trainer
from lightning_qnoise.callbacks.fit import log_after_fit
from lightning_qnoise.callbacks.origin import folder
from lightning_qnoise.file import save
from lightning_qnoise.size import size_table
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
        """Append a row."""
        self.rows.append({"name": name, "bytes": size.bytes, "ratio": size.compression, "metrics": dict(metrics)})

    def __str__(self) -> str:
        metrics = list(dict.fromkeys(metric for row in self.rows for metric in row["metrics"]))
        lines = [("", "bytes", "ratio", *metrics)]
        for row in self.rows:
            values = (f"{row['metrics'][m]:.4f}" if m in row["metrics"] else "" for m in metrics)
            lines.append((row["name"], f"{row['bytes']:,}", f"{row['ratio']:.1f}x", *values))
        return align(lines, n_left=1)


def log_quantized(trainer: Trainer, table: SizeTable, metrics: Mapping[str, float]) -> None:
    """Log the size and, as `quantized/<metric>`, the metrics of a model that is quantized in part or whole."""
    log_after_fit(trainer, {**{f"quantized/{name}": value for name, value in metrics.items()}, **table.metrics})


def report(trainer: Trainer, pl_module: LightningModule, record: Record, metrics: Mapping[str, float]) -> None:
    """Log and print what has become of the module, now that it is packed."""
    table = size_table(pl_module)
    log_quantized(trainer, table, metrics)
    rank_zero_info(f"Quantize: {table.float_bytes:,} to {table.bytes:,} bytes, {table.compression:.1f}x smaller")
    if record.rows:
        record.add("packed", table, metrics)
        rank_zero_info(f"{record}")


def write(trainer: Trainer, pl_module: LightningModule, name: str | None) -> None:
    """Write the packed file, unless it has no name or the fit is a trial run. Must be called on every rank."""
    if name is None or trainer.fast_dev_run:
        return
    path = folder(trainer) / name
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(pl_module, path)
    rank_zero_info(f"Quantize: wrote {path}")
