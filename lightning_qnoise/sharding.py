"""Weights whose rows are spread over ranks (DTensors of FSDP2): as a whole, the local part, and sums over all parts.

Every function takes ordinary tensors as well, and then has nothing to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor. Must be called on every rank."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank; it shares the tensor's memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Return those of `rows`, one for every row of a weight, that belong to this rank's part of the weight.

    Args:
        rows: `[weight.shape[0], ...]`, the same on every rank.
        weight: The weight; it `is_cut_in_rows`.
    """
    if not is_sharded(weight):
        return rows
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(rows, *_layout(weight)).to_local()


def gather_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of all ranks: the inverse of `local_rows`. Must be called on every rank."""
    if not is_sharded(weight):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size((weight.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, *_layout(weight), run_check=False, shape=shape, stride=stride).full_tensor()


def over_ranks(values: Tensor, weight: Tensor, reduce: str = "sum") -> Tensor:
    """Return the sum (or "max") of what every rank found in its own part of a weight. Must be called on every rank."""
    if not is_sharded(weight):
        return values
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh, placements = _layout(weight)
    partial = [Partial(reduce) if isinstance(p, Shard) else p for p in placements]
    return DTensor.from_local(values, mesh, partial, run_check=False).full_tensor()


def is_cut_in_rows(weight: Tensor) -> bool:
    """Whether a weight is not sharded, or only between rows, as FSDP does."""
    if not is_sharded(weight):
        return True
    from torch.distributed.tensor import Replicate, Shard

    return all(isinstance(placement, Replicate) or placement == Shard(0) for placement in _layout(weight)[1])


def _layout(weight: Any) -> tuple[Any, Any]:
    return weight.device_mesh, weight.placements
