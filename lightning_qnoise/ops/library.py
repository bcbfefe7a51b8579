"""How an operator enters `torch.ops.lightning_qnoise`.

`Library.define` and `impl` cost less per call than `torch.library.custom_op`. An operator has a reference in torch,
which serves every device that has no implementation of its own, and is opaque to `torch.compile`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lightning_qnoise", "FRAGMENT")
OPS = torch.ops.lightning_qnoise


@lru_cache
def has_triton() -> bool:
    """Whether the Triton kernels can be imported, and `LIGHTNING_QNOISE_TRITON=0` is not set when the package is.

    On a GPU without them the references serve.
    """
    return find_spec("triton") is not None and os.environ.get("LIGHTNING_QNOISE_TRITON") != "0"


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    setup: Callable[..., None] | None = None,
    casts: bool | Collection[int] = False,
) -> None:
    """Define an operator.

    Args:
        schema: Name, arguments and results, as `Library.define` takes them.
        reference: What it computes, with torch alone, on any device.
        fake: Returns empty results of the right shapes and dtypes.
        cpu: The implementation for CPUs, where it is not the reference.
        cuda: The implementation for GPUs; called only where triton is installed.
        backward: The gradient, `(ctx, *grads)`; without one the operator has none, and says so when it is asked.
        setup: What the gradient keeps, `(ctx, inputs, output)`.
        casts: Whether its floating-point inputs are cast under autocast, as those of `F.linear` are, or which ones.
    """
    name = LIBRARY.define(schema).split("(")[0]
    full = f"lightning_qnoise::{name}"
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(full, fake, lib=LIBRARY)
    torch.library.register_autograd(full, backward or _no_gradient, setup_context=setup, lib=LIBRARY)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _without_autocast(name, key.lower(), casts), f"Autocast{key}")
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None and has_triton():
        LIBRARY.impl(name, cuda, "CUDA")


def _no_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("this operator of lightning_qnoise has no gradient (of a gradient: no second derivative exists)")


def _without_autocast(name: str, device_type: str, casts: bool | Collection[int]) -> Callable[..., Any]:
    """Return what runs under autocast: it casts, or does not, and then computes as it is told."""

    def cast(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(device_type)) if fits else value

    def run(*args: Any) -> Any:
        which = range(len(args)) if casts is True else casts or ()
        with torch.autocast(device_type, enabled=False):
            return getattr(OPS, name)(*(cast(arg) if i in which else arg for i, arg in enumerate(args)))

    return run
