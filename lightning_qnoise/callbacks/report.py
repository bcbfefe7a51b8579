"""Tell what has become of a model: to the loggers, to the console, and in the packed file."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_qnoise.callbacks.base import LightningModule, Trainer
from lightning_qnoise.callbacks.fit import log_after_fit
from lightning_qnoise.callbacks.origin import folder
from lightning_qnoise.callbacks.record import Record
from lightning_qnoise.contents import write
from lightning_qnoise.file import contents_of
from lightning_qnoise.schemes import PackedWeight, Scheme
from lightning_qnoise.size import size_table
from lightning_qnoise.size_table import SizeTable


def log_quantized(trainer: Trainer, table: SizeTable, metrics: Mapping[str, float]) -> None:
    """Log the size and, as `quantized/<metric>`, the metrics of a model that is quantized in part or whole."""
    log_after_fit(trainer, {**{f"quantized/{name}": value for name, value in metrics.items()}, **table.metrics})


def note(
    trainer: Trainer,
    pl_module: LightningModule,
    record: Record,
    stage: int,
    quantized: Mapping[str, Scheme],
    metrics: Mapping[str, float],
) -> None:
    """Record what the module is after a stage, and log it; before the first (0) it is still float."""
    table = size_table(pl_module, quantized or None)
    record.add(f"stage {stage}" if stage else "float", table, metrics)
    if stage:
        log_quantized(trainer, table, metrics)


def report(
    trainer: Trainer,
    pl_module: LightningModule,
    record: Record,
    encoded: Mapping[str, PackedWeight],
    metrics: Mapping[str, float],
) -> None:
    """Log and print what has become of the module, now that it is packed (or stands for what is `encoded`)."""
    table = size_table(pl_module, {name: packed.scheme for name, packed in encoded.items()} or None)
    log_quantized(trainer, table, metrics)
    rank_zero_info(f"Quantize: {table.float_bytes:,} to {table.bytes:,} bytes, {table.compression:.1f}x smaller")
    if record.rows:
        record.add("packed", table, metrics)
        rank_zero_info(f"{record}")


def write_file(
    trainer: Trainer, pl_module: LightningModule, name: str | None, encoded: Mapping[str, PackedWeight]
) -> None:
    """Write the packed file, unless it has no name or the fit is a trial run. Must be called on every rank."""
    if name is None or trainer.fast_dev_run:
        return
    path, contents = folder(trainer) / name, contents_of(pl_module, encoded)
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, contents)
    rank_zero_info(f"Quantize: wrote {path}")
