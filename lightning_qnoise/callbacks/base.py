"""One base for our callbacks that both `pytorch_lightning` and `lightning.pytorch` take for their own."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero
from lightning_utilities.core.imports import module_available

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.utilities.types import LRSchedulerConfig
else:
    _LOG, _IN_USE = rank_zero.log, {"lightning.pytorch", "pytorch_lightning"} & sys.modules.keys()
    _ROOTS = [root for root in ("lightning.pytorch", "pytorch_lightning") if module_available(root)]
    if not _ROOTS:
        raise ImportError("lightning_qnoise's callbacks need Lightning: pip install pytorch-lightning")

    class Callback(*[import_module(root).Callback for root in _ROOTS]):
        """Of both roots. One that is switched off does not stand in the way of another of its class."""

        @property
        def state_key(self) -> str:
            return super().state_key if getattr(self, "enabled", True) else self._generate_state_key(enabled=False)

    DummyLogger = import_module(f"{_ROOTS[0]}.loggers.logger").DummyLogger
    LRSchedulerConfig = import_module(f"{_ROOTS[0]}.utilities.types").LRSchedulerConfig
    LightningModule = Any
    if _IN_USE:
        rank_zero.log = _LOG  # each root takes over the messages of both when it is imported

Trainer = Any  # of either root; its attributes are set by connectors, which type checkers do not see

__all__ = ["Callback", "DummyLogger", "LRSchedulerConfig", "LightningModule", "Trainer", "class_names"]


def class_names(obj: object) -> set[str]:
    """Return the names of an object's class and its bases, equal for both roots of Lightning."""
    return {cls.__name__ for cls in type(obj).__mro__}
