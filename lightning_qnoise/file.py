"""The packed file: one safetensors file whose tensors are the reported bytes, and whose metadata rebuild the layers."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_qnoise.convert import pack
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight, Scheme
from lightning_qnoise.size import stored_tensors
from lightning_qnoise.weights import FLOATS, owners

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


def save(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a model, packed or not, to one safetensors file, and return the bytes of its tensors.

    Codes are stored at their exact bits, everything else at its own dtype, tied tensors once. The file appears under
    its name only when it is complete; an interrupted save leaves an older file as it was.

    Args:
        model: Any module whose state dict holds only tensors.
        path: The file, conventionally `*.safetensors`. Its folder must exist.

    Raises:
        ValueError: The state dict holds something that is no tensor.
        OSError: The file cannot be written.
    """
    packed = dict(packed_weights(model))
    tensors, shared = stored_tensors(model)
    tied = {_weight_name(name, packed): _weight_name(first, packed) for name, first in shared.items()}
    specs = {
        name: PackedSpec(weight.scheme, tuple(weight.shape), weight.dtype)
        for name, weight in packed.items()
        if name not in tied
    }
    return write(path, Contents(tensors, specs, tied))


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


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill a float model from a packed file, in place, and return it.

    The model is the skeleton: built as for training, with any values, on any device including `meta`. Its selected
    layers become packed layers. Names, shapes and ties must agree exactly; nothing is changed if anything is wrong.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read (see `read`) or does not fit the model; the message lists what differs.
    """
    contents = read(path)
    if next(packed_weights(model), None) is not None:
        raise ValueError("the model is already packed: load into a freshly built one, or call dequantize(model) first")
    packed = {name: contents.rebuild(name) for name in contents.packed}
    problems = _differences(model, contents, packed)
    if problems:
        shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
        raise ValueError(f"{os.fspath(path)!r} does not fit the model:\n  {shown}")
    for name, _, _, parameter in owners(model):
        if name in packed:
            packed[name].to(device=None if parameter.is_meta else parameter.device, dtype=parameter.dtype)
    pack(model, packed)
    rest = {name: tensor for name, tensor in contents.tensors.items() if _weight_name(name, packed) == name}
    _fill(model, rest | {name: rest[first] for name, first in contents.tied.items() if first in rest})
    return model


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy into what exists; what lies on `meta` is exchanged for the tensor itself, tied Parameters for one."""
    made: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        layer, _, attribute = name.rpartition(".")
        module = modules[layer]
        current = getattr(module, attribute)
        if not current.is_meta:
            current.copy_(tensor)
        elif attribute in module._parameters:
            new = nn.Parameter(tensor.to(current.dtype), current.requires_grad)
            module._parameters[attribute] = made.setdefault(id(current), new)
        else:
            module._buffers[attribute] = tensor.to(current.dtype)


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


def _differences(model: nn.Module, contents: Contents, packed: Mapping[str, PackedWeight]) -> list[str]:
    """What the model expects and the file lacks, the other way round, and what has another shape or tie."""
    tensors, tied = stored_tensors(model)
    expected = {name: _kind(tensor) for name, tensor in tensors.items()}
    stored = {name: _kind(t) for name, t in contents.tensors.items() if _weight_name(name, packed) == name}
    stored |= {name: f"float {list(weight.shape)}" for name, weight in packed.items()}
    problems = [f"{name!r} is in the model, not in the file" for name in expected.keys() - stored.keys()]
    problems += [f"{name!r} is in the file, not in the model" for name in stored.keys() - expected.keys()]
    problems += [
        f"{name!r} is {stored[name]} in the file, {expected[name]} in the model"
        for name in expected.keys() & stored.keys()
        if expected[name] != stored[name]
    ]
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in tensors | tied]
    problems += [f"{name!r} is a buffer on meta that no file holds; build the model on a real device" for name in lost]
    problems += [f"{a!r} is tied to {b!r} in the file only" for a, b in contents.tied.items() - tied.items()]
    problems += [f"{a!r} is tied to {b!r} in the model only" for a, b in tied.items() - contents.tied.items()]
    return sorted(problems)


def _kind(tensor: Tensor) -> str:
    return f"{'float' if tensor.is_floating_point() else tensor.dtype} {list(tensor.shape)}"


def _weight_name(name: str, packed: Mapping[str, PackedWeight]) -> str:
    """The name of the packed weight that a tensor belongs to, or the tensor's own."""
    owner = name.rpartition(".")[0]
    return owner if owner in packed else name
