"""Size as a fact: the bytes of the tensors that a file would hold, each stored tensor once. 1 MB is 10^6 bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import Policy, resolve
from lightning_qnoise.schemes import Scheme


def nbytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and persistent buffers, tied tensors once (also on `meta`).

    Example:
        >>> from lightning_qnoise import PQ
        >>> nbytes(PQ(block_size=8, n_centroids=256).empty((512, 784), device="meta"))
        54272
    """
    return sum(tensor.nbytes for tensor in stored_tensors(module)[0].values())


def stored_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a file of the module holds: tensors under their first names, and other name -> first name.

    Raises:
        ValueError: The state dict holds something that is no tensor (`get_extra_state`).
    """
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} in the state dict is a {type(value).__name__}, only tensors can be stored")
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value
    return tensors, tied


@dataclass(frozen=True)
class Entry:
    """One stored weight or buffer: its name, bytes as float and as stored, and the scheme (None: kept float)."""

    name: str
    float_bytes: int
    bytes: int
    scheme: Scheme | None = None

    @property
    def layer(self) -> str:
        """The layer that owns it."""
        return self.name.rpartition(".")[0]


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

    def layers(self) -> list[Entry]:
        """Return one entry a layer, in the model's order."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.layer, []).append(entry)
        return [
            Entry(
                f"{layer}.",
                sum(e.float_bytes for e in group),
                sum(e.bytes for e in group),
                next((e.scheme for e in group if e.scheme), None),
            )
            for layer, group in groups.items()
        ]

    def __str__(self) -> str:
        rows = [("layer", "scheme", "float bytes", "bytes", "ratio")]
        for entry in self.layers():
            scheme = "float" if entry.scheme is None else str(entry.scheme)
            rows.append((entry.layer or "(model)", scheme, *_numbers(entry.float_bytes, entry.bytes)))
        rows.append(("total", f"{self.total_mb:.3f} MB", *_numbers(self.float_bytes, self.bytes)))
        return _align(rows)


def size_table(model: nn.Module, policy: Policy | None = None) -> SizeTable:
    """Return the size of a model as it is, or (with a policy) as it will be once packed.

    Args:
        model: Any module, packed or not, also on the `meta` device.
        policy: See `lightning_qnoise.policy.resolve`; the model is not changed.

    Raises:
        ValueError: The policy does not fit the model.

    Example:
        >>> table = size_table(nn.Sequential(nn.Linear(64, 64, bias=False)), "int8")
        >>> table.float_bytes, table.bytes
        (16384, 4416)
    """
    packed = dict(packed_weights(model))
    schemes = resolve(model, policy) if policy is not None else {}
    tensors, _ = stored_tensors(model)
    sizes: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        owner = name.rpartition(".")[0]
        if owner in packed:
            sizes.setdefault(owner, packed_entry(owner, packed[owner].scheme, packed[owner].shape, packed[owner].dtype))
        elif name in schemes:
            sizes[name] = packed_entry(name, schemes[name], tensor.shape, tensor.dtype)
        else:
            sizes[name] = Entry(name, tensor.nbytes, tensor.nbytes)
    return SizeTable(tuple(sizes.values()))


def packed_entry(name: str, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> Entry:
    """Return the size of one compressed weight, from its shape alone."""
    return Entry(name, math.prod(shape) * dtype.itemsize, nbytes(scheme.empty(shape, dtype, "meta")), scheme)


def size_metrics(table: SizeTable) -> Mapping[str, float]:
    """Return the logged names and values: `size/total_mb`, `size/compression`."""
    return {"size/total_mb": table.total_mb, "size/compression": table.compression}


def _numbers(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{before / after:.1f}x" if after else "-"


def _align(rows: Iterable[Sequence[str]]) -> str:
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
