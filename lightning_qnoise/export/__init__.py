"""Packed models as other runtimes read them."""

from lightning_qnoise.export.onnx import export_onnx

__all__ = ["export_onnx"]
