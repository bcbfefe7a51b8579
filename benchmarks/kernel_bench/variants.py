"""A variant is one way to compute something; it is checked against float64 before it is timed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Tensor]
# of the largest error over the largest value; float16 and bfloat16 may round four times, and peers add in them
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXACT = 1e-5


class Memory(NamedTuple):
    """What a layer holds besides what one call takes."""

    held_bytes: int  # its packed weight
    file_bytes: int  # its file
    forget: Callable[[], object]  # lets go of what earlier calls have left


@dataclass(frozen=True)
class Variant:
    """One way to compute something.

    Attributes:
        name: As rows and the plot call it.
        calls: One for every copy of the weight.
        expected: `expected(i)` is what `calls[i]` computes, in float64.
        n_bytes: Bytes of the operands and of the result of a call.
        detail: What it chose, or its version.
        read: What of a result is compared with `expected`.
        memory: Of a layer.
        rotates: Whether it has enough copies to be called cold.
    """

    name: str
    calls: Sequence[Call]
    expected: Callable[[int], Tensor]
    n_bytes: int
    detail: str = ""
    read: Callable[[Tensor, int], Tensor] = lambda y, i: y
    memory: Memory | None = None
    rotates: bool = True


def n_bytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fault_in(variant: Variant, y: Tensor, i: int) -> str:
    """Return what is wrong with the result of `calls[i]`; an empty string if nothing is."""
    actual, expected = variant.read(y, i).double(), variant.expected(i)
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)} in place of {list(expected.shape)}"
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    allowed = TOLERANCES.get(y.dtype, EXACT)
    return "" if error <= allowed else f"relative error {error:.1e}, where {allowed:.0e} is allowed"


def fault_of(variant: Variant) -> str:
    """Call a variant on the first and the last copy with poisoned memory; return what is wrong, or an empty string."""
    for i in sorted({0, len(variant.calls) - 1}):
        with poisoned():
            y = variant.calls[i]()
        fault = fault_in(variant, y, i)
        if fault:
            return fault
    return ""


@contextmanager
def poisoned() -> Iterator[None]:
    """Let all new memory hold NaN or the largest integer, so that what is not written shows."""
    before, filled = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a deterministic implementation
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
            torch.utils.deterministic.fill_uninitialized_memory = filled


def poison(y: Tensor) -> None:
    """Overwrite a result."""
    y.fill_(torch.nan if y.is_floating_point() else 0)
