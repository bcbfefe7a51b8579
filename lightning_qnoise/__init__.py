"""Quant-Noise, product quantization and honest model sizes for PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.codebooks import train_codebooks
from lightning_qnoise.convert import dequantize, quantize
from lightning_qnoise.distill import Guidance
from lightning_qnoise.export import export_onnx
from lightning_qnoise.file import load, save
from lightning_qnoise.memory import set_memory
from lightning_qnoise.schedules import ConstantRate, CosineRate, LinearRate, StepRate, WarmupCosine
from lightning_qnoise.schemes import PQ, Int
from lightning_qnoise.size import size_table

if TYPE_CHECKING:
    from lightning_qnoise.callbacks import Distill, Finetune, ModelSize, Quantize, QuantNoise

__version__ = "0.1.0"

__all__ = [
    "PQ",
    "ConstantRate",
    "CosineRate",
    "Distill",
    "Finetune",
    "Guidance",
    "Int",
    "LinearRate",
    "ModelSize",
    "QuantNoise",
    "Quantize",
    "StepRate",
    "WarmupCosine",
    "calibrate",
    "dequantize",
    "export_onnx",
    "load",
    "quantize",
    "save",
    "set_memory",
    "size_table",
    "train_codebooks",
]


def __getattr__(name: str) -> Any:
    """Import the callbacks, and with them Lightning, when first asked for."""
    if name in ("Distill", "Finetune", "ModelSize", "QuantNoise", "Quantize"):
        from lightning_qnoise import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
