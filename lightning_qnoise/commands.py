"""Tools for files, on tensors and metadata alone: no model code runs, and no pickle but Lightning's own is read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_qnoise.calibrate import is_static
from lightning_qnoise.contents import FORMAT, Contents, PackedSpec, read, weight_name, write
from lightning_qnoise.convert import check_finite
from lightning_qnoise.layers import PackedAttention
from lightning_qnoise.policy import Policy, resolve
from lightning_qnoise.size import tabulate
from lightning_qnoise.size_table import SizeTable
from lightning_qnoise.weights import Weight


def file_size(path: Path) -> SizeTable:
    """Return the size of a packed file, a safetensors file or a checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these, or damaged.
    """
    contents = _contents(path)
    return tabulate(contents.tensors, contents.packed)


def quantize_file(source: Path, target: Path, policy: Policy) -> SizeTable:
    """Compress the weights of a checkpoint into a packed file that `load` takes; return its size.

    A checkpoint holds no layer classes, so globs match names only (`type:` matches nothing), and presets take every
    tensor of two or more dimensions whose name holds "weight". What enters a layer can be quantized dynamically only.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is no float checkpoint, the policy does not fit it or needs data, or a weight holds NaN or Inf.
    """
    contents = _contents(source)
    if contents.packed:
        raise ValueError(f"{str(source)!r} is packed already; dequantize it first")
    names = {name: [name] for name in contents.tensors}
    for name, first in contents.tied.items():
        names[first].append(name)
    weights = [
        Weight(tuple(names[name]), frozenset(), tuple(tensor.shape), tensor.dtype, None, _takes_input(name))
        for name, tensor in contents.tensors.items()
        if tensor.is_floating_point()
    ]
    tensors = dict(contents.tensors)
    specs = {}
    for name, scheme in resolve(weights, policy).items():
        if scheme.needs_inputs or is_static(scheme):
            raise ValueError(f"layer {name!r}: {scheme} needs data, which a checkpoint does not hold; use quantize()")
        weight = tensors.pop(name)
        check_finite(name, weight)
        tensors.update(scheme.encode(weight).state_dict(prefix=f"{name}."))
        specs[name] = PackedSpec(scheme, tuple(weight.shape), weight.dtype)
    write(target, Contents(tensors, specs, contents.tied))
    written = read(target)
    return tabulate(written.tensors, written.packed)


def _takes_input(name: str) -> bool:
    """Whether what enters the layer of a weight can be quantized, as far as its name tells."""
    return name.rpartition(".")[2] in ("weight", *PackedAttention.inputs)


def dequantize_file(source: Path, target: Path) -> SizeTable:
    """Write a packed file's decoded weights as a checkpoint `{"state_dict": ...}`; return the size of that.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no packed file.
    """
    contents = read(source)
    state = {name: t for name, t in contents.tensors.items() if weight_name(name, contents.packed) == name}
    for name in contents.packed:
        state[name] = contents.rebuild(name).decode()
    state.update({name: state[first] for name, first in contents.tied.items()})
    torch.save({"state_dict": state}, target)
    return file_size(target)


def shipped_config(name: str) -> str:
    """Return the text of a configuration that the package ships.

    Raises:
        ValueError: There is none of that name.
    """
    folder = files("lightning_qnoise.demos") / "configs"
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if name not in known:
        raise ValueError(f"there is no configuration {name!r}; choose from {', '.join(known)}")
    return (folder / f"{name}.yaml").read_text()


def _contents(path: Path) -> Contents:
    """Read a packed file, a plain safetensors file or a checkpoint; tensors that share memory are taken once."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.suffix != ".safetensors":
        return _once(_state_dict(path))
    try:
        with safe_open(path, framework="pt") as file:
            packed = (file.metadata() or {}).get("format") == FORMAT
        return read(path) if packed else _once(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error


def _state_dict(path: Path) -> Mapping[str, Tensor]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint of plain tensors: {error}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{str(path)!r} holds no state dict of tensors")
    return state


def _once(state: Mapping[str, Tensor]) -> Contents:
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return Contents({name: tensor for name, tensor in state.items() if name not in tied}, {}, tied)
