"""Packed models to ONNX files that stay as small: codes and codebooks are stored, and decoded in the graph."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lightning_qnoise.export.convolutions import settle_convolutions
from lightning_qnoise.export.graph_weight import GraphWeight, Shelf
from lightning_qnoise.export.graph_weights import stand_in
from lightning_qnoise.export.operators import OPSET
from lightning_qnoise.export.uses import separate_weights
from lightning_qnoise.layers import PackedLayer, packed_names
from lightning_qnoise.schemes import PackedWeight

if TYPE_CHECKING:
    import onnx_ir as ir


def export_onnx(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> int:
    """Write a model, packed or not, to one ONNX file (opset 21), and return the bytes of the file.

    The graph computes what the packed model computes in evaluation mode. Integer weights are stored as int8, in four
    bits where they have four or fewer, PQ weights as codes (half a byte, a byte or two bytes each) and their codebook;
    tied weights once. A static activation of 8 bits becomes QuantizeLinear and DequantizeLinear, a dynamic one of 8
    bits per tensor DynamicQuantizeLinear, for which ONNX Runtime has integer kernels; any other activation is computed
    as in torch, in floats. A convolution runs as integers where its output is quantized for the next layer. On x86
    processors without VNNI these kernels saturate and return wrong products of 8-bit weights, unless the session has
    `options.add_session_config_entry("session.x64quantprecision", "1")`; of 7 bits they are exact everywhere.

    Args:
        model: Any module that `torch.export` can trace; it is not changed.
        args: Positional example inputs.
        path: The file, `*.onnx`. Beyond 2 GB, tensors lie beside it in `<path>.data`, which is not counted.
        kwargs: Example inputs by keyword.
        dynamic_shapes: Which dimensions may vary, as for `torch.export.export`.
        input_names: Names of the graph's inputs.
        output_names: Names of the graph's outputs.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        RuntimeError: torch is older than 2.8, or cannot trace the model.
        ValueError: A weight has no form in ONNX, or a static activation is not calibrated.

    Example:
        >>> from lightning_qnoise import PQ, quantize
        >>> model = quantize(nn.Sequential(nn.Linear(256, 256)), {"*": PQ(block_size=8, n_centroids=16)})
        >>> n_bytes = export_onnx(model, (torch.randn(2, 256),), "small.onnx")  # doctest: +SKIP
    """
    _require_onnx()
    traced, shelves = _with_graph_weights(model)
    options: dict[str, Any] = {"kwargs": dict(kwargs or {}), "dynamic_shapes": dynamic_shapes}
    options |= {"input_names": input_names, "output_names": output_names, "opset_version": OPSET}
    # optimize=True would decode small PQ weights
    program = torch.onnx.export(traced, tuple(args), **options, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    _narrow(program.model.graph, set(_full_names(traced, [(shelf.layer, shelf.narrow) for shelf in shelves])))
    _optimize(program.model, set(_full_names(traced, [(shelf.layer, shelf.names) for shelf in shelves])))
    program.save(path)
    return os.path.getsize(path)


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"export_onnx needs {name}: pip install 'lightning-qnoise[onnx]'", name=name)
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(f"export_onnx needs torch 2.8 or newer, this is {torch.__version__}")


def _with_graph_weights(model: nn.Module) -> tuple[nn.Module, list[Shelf]]:
    """A copy in evaluation mode whose packed weights are stand-ins, and where these keep their tensors."""
    traced = copy.deepcopy(model).eval()
    made: dict[PackedWeight, GraphWeight] = {}
    for prefix, layer in traced.named_modules():
        if not isinstance(layer, PackedLayer):
            continue
        for name in packed_names(layer):
            packed = layer.packed(name)
            if packed not in made:
                try:
                    made[packed] = stand_in(packed, Shelf(layer, f"{name}_"))
                except ValueError as error:
                    raise ValueError(f"layer {f'{prefix}.{name}'.lstrip('.')!r}: {error}") from error
            layer._modules[name] = made[packed]
    return traced, [weight.shelf for weight in made.values()]


def _full_names(model: nn.Module, buffers: Sequence[tuple[nn.Module, Collection[str]]]) -> Iterator[str]:
    """Every name in the model of buffers that are given by their layers."""
    of_layer = {id(layer): [*names] for layer, names in buffers}
    for prefix, module in model.named_modules(remove_duplicate=False):
        yield from (f"{prefix}.{name}".lstrip(".") for name in of_layer.get(id(module), ()))


def _narrow(graph: ir.Graph, names: Collection[str]) -> None:
    """Store the named integers in four bits each."""
    import onnx_ir as ir

    for name in names & graph.initializers.keys():
        value = graph.initializers[name]
        assert value.const_value is not None
        codes = value.const_value.numpy()
        dtype = ir.DataType.INT4 if codes.dtype == np.int8 else ir.DataType.UINT4
        value.const_value = ir.Tensor(codes.astype(dtype.numpy()), dtype=dtype, name=name)
        value.dtype = dtype


def _optimize(model: ir.Model, stored: Collection[str]) -> None:
    """Simplify the graph, with the stored tensors left as they are, and drop all that only torch would read."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in stored for value in node.inputs) else None

    optimizer.optimize_ir(model, should_fold=should_fold)
    settle_convolutions(model.graph)
    separate_weights(model.graph)
    for simplify in (common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass()):
        simplify(model)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
