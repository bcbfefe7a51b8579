"""Size as a fact: the bytes of the tensors that a file would hold, each stored tensor once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_qnoise.codebooks import stored_state_dict
from lightning_qnoise.contents import PackedSpec, weight_name
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import Policy, resolve
from lightning_qnoise.schemes import PackedWeight, Scheme
from lightning_qnoise.size_table import Entry, SizeTable


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
    for name, value in stored_state_dict(module).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} in the state dict is a {type(value).__name__}, only tensors can be stored")
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value
    return tensors, tied


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
    packed: dict[str, PackedSpec | PackedWeight] = dict(packed_weights(model))
    tensors, _ = stored_tensors(model)
    schemes = resolve(model, policy) if policy is not None else {}
    for name, scheme in schemes.items():
        packed[name] = PackedSpec(scheme, tuple(tensors[name].shape), tensors[name].dtype)
    return tabulate(tensors, packed)


def tabulate(tensors: Mapping[str, Tensor], packed: Mapping[str, PackedSpec | PackedWeight]) -> SizeTable:
    """Return the size of stored tensors; those of a packed weight, or the weight to be packed, make one entry."""
    sizes: dict[str, Entry] = {}
    for stored, tensor in tensors.items():
        name = weight_name(stored, packed)
        if name not in packed:
            sizes[name] = Entry(name, tensor.nbytes, tensor.nbytes)
        elif name not in sizes:
            sizes[name] = packed_entry(name, packed[name].scheme, packed[name].shape, packed[name].dtype)
    return SizeTable(tuple(sizes.values()))


def packed_entry(name: str, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> Entry:
    """Return the size of one compressed weight, from its shape alone."""
    return Entry(name, math.prod(shape) * dtype.itemsize, nbytes(scheme.empty(shape, dtype, "meta")), scheme)
