"""Teacher-guided training: a frozen or slowly moving model whose outputs a student is drawn towards."""

from lightning_qnoise.distill.average import MovingAverage
from lightning_qnoise.distill.capture import Call, Capture
from lightning_qnoise.distill.guide import Guide, Rehearsal
from lightning_qnoise.distill.losses import Guidance, soft_targets

__all__ = ["Call", "Capture", "Guidance", "Guide", "MovingAverage", "Rehearsal", "soft_targets"]
