"""Models to packed files and back: the metadata rebuild the packed layers in a float skeleton, strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_qnoise.contents import Contents, PackedSpec, read, weight_name, write
from lightning_qnoise.convert import pack
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight
from lightning_qnoise.sharding import whole
from lightning_qnoise.size import stored_tensors
from lightning_qnoise.weights import owners

_Model = TypeVar("_Model", bound=nn.Module)


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
    return write(path, contents_of(model))


def contents_of(model: nn.Module, encoded: Mapping[str, PackedWeight] | None = None) -> Contents:
    """Return what the file of a model holds. A sharded model is gathered: it must be called on every rank.

    Args:
        model: Any module, packed or not.
        encoded: Encodings that stand for Parameters of the model (which cannot be packed itself while it is sharded).

    Raises:
        ValueError: The state dict holds something that is no tensor.
    """
    packed = dict(packed_weights(model)) | dict(encoded or {})
    tensors, shared = stored_tensors(model)
    tied = {weight_name(name, packed): weight_name(first, packed) for name, first in shared.items()}
    specs = {
        name: PackedSpec(weight.scheme, tuple(weight.shape), weight.dtype)
        for name, weight in packed.items()
        if name not in tied
    }
    held = {name: whole(tensor) for name, tensor in tensors.items()}
    for name, weight in (encoded or {}).items():
        del held[name]
        held |= {f"{name}.{key}": tensor for key, tensor in weight.state_dict().items()}
    return Contents(held, specs, tied)


def load(model: _Model, path: str | os.PathLike[str]) -> _Model:
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
    rest = {name: tensor for name, tensor in contents.tensors.items() if weight_name(name, packed) == name}
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


def _differences(model: nn.Module, contents: Contents, packed: Mapping[str, PackedWeight]) -> list[str]:
    """What the model expects and the file lacks, the other way round, and what has another shape or tie."""
    tensors, tied = stored_tensors(model)
    expected = {name: _kind(tensor) for name, tensor in tensors.items()}
    stored = {name: _kind(t) for name, t in contents.tensors.items() if weight_name(name, packed) == name}
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
