"""What enters a layer in other forms than one tensor: the same tensor twice, and nested tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once(function: Callable[[Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the function of every input, computed once for one that comes twice: self-attention asks by `is`.

    Example:
        >>> x = torch.ones(1)
        >>> a, b = once(torch.neg, x, x)
        >>> a is b
        True
    """
    done: list[Tensor] = []
    for place, x in enumerate(inputs):
        twins = [done[i] for i in range(place) if inputs[i] is x]
        done.append(twins[0] if twins else function(x))
    return done


def on_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the function of all rows of a nested tensor, as of one matrix, nested again.

    Example:
        >>> x = torch.nested.nested_tensor([torch.zeros(1, 2), torch.zeros(3, 2)])
        >>> [part.shape for part in on_rows(torch.exp, x).unbind()]
        [torch.Size([1, 2]), torch.Size([3, 2])]
    """
    if x.layout is torch.jagged:
        jagged: Any = x
        return torch.nested.nested_tensor_from_jagged(function(x.values()), jagged.offsets(), jagged.lengths())
    parts = x.unbind()
    rows = function(torch.cat(parts)).split([len(part) for part in parts])
    return torch.nested.as_nested_tensor(list(rows))
