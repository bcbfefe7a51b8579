"""When things happen: the only folder, with the command line and the demos, that imports Lightning."""

from lightning_qnoise.callbacks.distill import Distill
from lightning_qnoise.callbacks.finetune import Finetune
from lightning_qnoise.callbacks.model_size import ModelSize
from lightning_qnoise.callbacks.quant_noise import QuantNoise
from lightning_qnoise.callbacks.quantize import Quantize

__all__ = ["Distill", "Finetune", "ModelSize", "QuantNoise", "Quantize"]
