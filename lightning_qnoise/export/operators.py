"""Operators of ONNX in a torch trace: they stand for themselves in the exported graph and compute nothing here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OPSET = 21  # the first with integers of four bits
_INT8 = 3  # onnx.TensorProto.INT8


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return QuantizeLinear of float32 `x`, uint8, with a scale float32 `[]` and a zero point uint8 `[]`."""
    return _operator("QuantizeLinear", (x, scale, zero_point), {}, torch.uint8, x.shape)


def quantize_dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return DynamicQuantizeLinear of float32 `x`: codes uint8, scale float32 `[]`, zero point uint8 `[]`."""
    dtypes = (torch.uint8, torch.float32, torch.uint8)
    codes, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
        "::DynamicQuantizeLinear", (x,), {}, dtypes=dtypes, shapes=(x.shape, (), ()), version=OPSET
    )
    return codes, scale, zero_point


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """Return DequantizeLinear, float32 of the shape of `codes`, with a scale for each index of `axis` if given."""
    attributes = {} if axis is None else {"axis": axis}
    return _operator("DequantizeLinear", (codes, scale, zero_point), attributes, torch.float32, codes.shape)


def cast_to_int8(codes: Tensor) -> Tensor:
    """Return a Cast to int8, which torch would leave out: the file will hold `codes` in four bits."""
    return _operator("Cast", (codes,), {"to": _INT8}, torch.int8, codes.shape)


def _operator(
    name: str, inputs: Sequence[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    return torch.onnx.ops.symbolic(f"::{name}", inputs, attributes, dtype=dtype, shape=shape, version=OPSET)
