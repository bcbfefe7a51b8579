"""Convolutions of integers in an ONNX graph: what ONNX Runtime needs to see to run them as integers.

Its only fast integer convolution, QLinearConv, has quantized outputs. So a convolution is one of integers where what
follows it is quantized, through a BatchNormalization too if that is folded into its scales. Any other is computed in
floats, from the quantized input, and gets a weight that is dequantized when the file is loaded, not in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_TRANSPARENT = {"Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Unsqueeze"}  # a quantization may move before


def settle_convolutions(graph: ir.Graph) -> None:
    """Choose integers or floats for every convolution with a DequantizeLinear weight, in place."""
    for conv in [node for node in graph if node.op_type in ("Conv", "ConvTranspose")]:
        weight = _producer(conv.inputs[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        follower = _only_user(conv.outputs[0])
        norm = follower if follower is not None and follower.op_type == "BatchNormalization" else None
        if not _becomes_integers((norm or conv).outputs[0]):
            _dequantize_at_load(graph, conv, weight)
        elif norm is not None and conv.op_type == "Conv":
            _fold(graph, norm, conv, weight)


def _becomes_integers(value: ir.Value) -> bool:
    """Whether a QuantizeLinear follows."""
    while (node := _only_user(value)) is not None:
        if node.op_type == "QuantizeLinear":
            return True
        if node.op_type not in _TRANSPARENT:
            return False
        value = node.outputs[0]
    return False


def _dequantize_at_load(graph: ir.Graph, conv: ir.Node, weight: ir.Node) -> None:
    """Compute `(codes - zero_point) * scale` as a product of constants."""
    import onnx_ir as ir

    codes, scale, zero_point = weight.inputs
    name, shape = conv.outputs[0].name, [-1] + [1] * (_array(codes).ndim - 1)
    zeros = _constant(graph, _array(zero_point).astype(np.float32).reshape(shape), f"{name}_zero_point")
    scales = _constant(graph, _array(scale).reshape(shape), f"{name}_scale")
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    shifted = ir.node("Sub", [cast.outputs[0], zeros])
    product = ir.node("Mul", [shifted.outputs[0], scales])
    graph.insert_before(conv, [cast, shifted, product])
    conv.replace_input_with(1, product.outputs[0])


def _fold(graph: ir.Graph, norm: ir.Node, conv: ir.Node, weight: ir.Node) -> None:
    """Multiply the scales of a convolution by what the norm does to its channels, and add a bias."""
    import onnx_ir as ir

    codes, scale, zero_point = weight.inputs
    gamma, beta, mean, variance = (_array(value).astype(np.float64) for value in norm.inputs[1:])
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    bias = _array(conv.inputs[2]) if len(conv.inputs) > 2 else 0.0
    name, zeros = norm.outputs[0].name, np.broadcast_to(_array(zero_point).astype(np.int8), factor.shape)
    scales = _constant(graph, (_array(scale) * factor).astype(np.float32), f"{name}_scale")
    inputs = [codes, scales, _constant(graph, np.ascontiguousarray(zeros), f"{name}_zero_point")]
    folded = ir.node("DequantizeLinear", inputs, {"axis": 0})
    graph.insert_before(conv, folded)
    conv.replace_input_with(1, folded.outputs[0])
    conv.resize_inputs(3)
    conv.replace_input_with(2, _constant(graph, (beta + (bias - mean) * factor).astype(np.float32), f"{name}_bias"))
    norm.outputs[0].replace_all_uses_with(conv.outputs[0])
    graph.remove(norm, safe=True)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    return None if len(uses) != 1 or value.is_graph_output() else next(iter(uses)).node


def _array(value: ir.Value | None) -> np.ndarray:
    """The constant that a value is, or that it is a Cast of."""
    cast = _producer(value)
    constant = value if cast is None else cast.inputs[0]
    assert constant is not None and constant.const_value is not None
    return constant.const_value.numpy()


def _constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    import onnx_ir as ir

    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
