"""The packed file on disk and in memory: one safetensors file whose tensors are the reported bytes."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_qnoise.schemes import PackedWeight, Scheme
from lightning_qnoise.weights import FLOATS

FORMAT, VERSION = "lightning_qnoise", 1


@dataclass(frozen=True)
class PackedSpec:
    """What the metadata hold of one packed weight."""

    scheme: Scheme
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Contents:
    """A packed file in memory.

    Attributes:
        tensors: Every stored tensor by its name.
        packed: The packed weights: parameter name -> spec.
        tied: Other name -> first name of a tied parameter or buffer (of the weight itself, not of its codes).
    """

    tensors: Mapping[str, Tensor]
    packed: Mapping[str, PackedSpec]
    tied: Mapping[str, str]

    def rebuild(self, name: str) -> PackedWeight:
        """Return the packed weight of that name.

        Raises:
            ValueError: Its tensors do not fit its scheme and shape.
        """
        spec = self.packed[name]
        packed = spec.scheme.empty(spec.shape, spec.dtype)
        state = {key: self.tensors.get(f"{name}.{key}") for key in packed.state_dict()}
        for key, expected in packed.state_dict().items():
            found = state[key]
            if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                raise ValueError(f"the file is damaged: tensor {name}.{key} does not fit {spec}")
        packed.load_state_dict(state)
        return packed


def weight_name(name: str, packed: Container[str]) -> str:
    """Return the name of the packed weight that a stored tensor belongs to, or the tensor's own."""
    owner = name
    while owner := owner.rpartition(".")[0]:
        if owner in packed:
            return owner
    return name


def write(path: str | os.PathLike[str], contents: Contents) -> int:
    """Write contents to a file, all or nothing, and return the bytes of its tensors."""
    policy = {
        name: {**spec.scheme.to_dict(), "shape": spec.shape, "dtype": str(spec.dtype).removeprefix("torch.")}
        for name, spec in contents.packed.items()
    }
    tensors = {  # copies, no two of which share memory
        name: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor.detach())
        for name, tensor in contents.tensors.items()
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "policy": json.dumps(policy),
        "tied": json.dumps(dict(contents.tied)),
        "crc32": _crc32(tensors),
    }
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"cannot write {os.fspath(path)!r}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return sum(tensor.nbytes for tensor in tensors.values())


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file that `save` wrote, to the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated, no safetensors file, not of this package, of a newer version, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata)
            return _contents(metadata, {name: file.get_tensor(name) for name in file.keys()})
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r}: truncated or no safetensors file ({error})") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def _crc32(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of all names and bytes."""
    crc = 0
    for name in sorted(tensors):
        data = tensors[name].flatten().view(torch.uint8).numpy().tobytes()
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError("a safetensors file, but not one that lightning_qnoise wrote")
    version = metadata.get("version", "unknown")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(f"format version {version}, this lightning_qnoise reads up to {VERSION}; upgrade it")


def _contents(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Contents:
    try:
        packed = {name: _spec(data) for name, data in json.loads(metadata["policy"]).items()}
        tied, crc32 = dict(json.loads(metadata["tied"])), metadata["crc32"]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"damaged, its metadata cannot be read ({error!r})") from error
    if crc32 != _crc32(tensors):
        raise ValueError("damaged, its tensors are not the ones that were written")
    return Contents(tensors, packed, tied)


def _spec(data: dict[str, Any]) -> PackedSpec:
    shape, dtype = tuple(data.pop("shape")), data.pop("dtype")
    dtypes = {str(known).removeprefix("torch."): known for known in FLOATS}
    return PackedSpec(Scheme.from_dict(data), shape, dtypes[dtype])
