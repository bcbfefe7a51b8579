"""The device that the cases run on: CUDA where it is, a simulated one elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

IS_REAL = torch.cuda.is_available()
if IS_REAL:
    GPU = torch.device("cuda", 0)
    torch.backends.cudnn.allow_tf32 = False
else:
    from devices import simulated

    GPU = simulated.GPU


def at_work() -> AbstractContextManager[Any]:
    """Tensors can be made on the device within."""
    return nullcontext() if IS_REAL else simulated.Simulation()


def on_device() -> dict[str, Any]:
    """What a Trainer takes to train there."""
    return {"accelerator": "gpu", "devices": 1} if IS_REAL else {"strategy": simulated.Strategy()}


@contextmanager
def no_waits() -> Iterator[None]:
    """Nothing that the device computes is read within, so that the host never waits for it."""
    if not IS_REAL:
        simulated.log.clear()
        yield
        assert not simulated.log
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
