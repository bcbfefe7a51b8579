"""Integer weights in an ONNX graph: ONNX Runtime's exact mode needs a copy of what reads one for every use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def separate_weights(graph: ir.Graph) -> None:
    """Let every product read its weight by a DequantizeLinear (and Transpose) of its own, in place.

    Its zero points are its own, too, a byte each; codes and scales stay shared. For processors without VNNI, ONNX
    Runtime rewrites each weight from int8 to uint8 where it is multiplied, and fails on what it has rewritten before.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and _is_weight(weight.producer()):
            _separate(graph, node)
    for node in list(graph):
        if _is_weight(node):
            _separate(graph, node)
    seen = set()
    for node in graph:
        zeros = node.inputs[-1] if _is_weight(node) else None
        if zeros is not None and zeros.name in seen:
            _own_zeros(graph, node, zeros)
        elif zeros is not None:
            seen.add(zeros.name)


def _is_weight(node: ir.Node | None) -> bool:
    """Whether a node dequantizes stored integers."""
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        return False
    codes = node.inputs[0]
    return codes is not None and codes.is_initializer()


def _separate(graph: ir.Graph, node: ir.Node) -> None:
    """Copy a node for each use of its output but the first."""
    import onnx_ir as ir

    output = node.outputs[0]
    for user, place in list(output.uses())[1:]:
        twin = ir.Node(node.domain, node.op_type, node.inputs, node.attributes.values())
        twin.outputs[0].type, twin.outputs[0].shape = output.type, output.shape
        graph.insert_after(node, twin)
        user.replace_input_with(place, twin.outputs[0])


def _own_zeros(graph: ir.Graph, node: ir.Node, zeros: ir.Value) -> None:
    import onnx_ir as ir

    n = sum(1 for name in graph.initializers if name.startswith(f"{zeros.name}_"))
    own = ir.val(f"{zeros.name}_{n}", const_value=zeros.const_value)
    graph.register_initializer(own)
    node.replace_input_with(2, own)
