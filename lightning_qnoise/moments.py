"""The second moment of what enters a layer, in the columns of its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qnoise.layers import forward_of


class InputMoment:
    """The mean of `x x^T` over all inputs of a layer that it has seen."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._n = 0

    def hook(self, name: str, inputs: Sequence[str]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return a forward pre-hook that looks at some arguments; `name` is for messages."""

        @torch.no_grad()
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(forward_of(module).arguments() or ("input",), args, strict=False)) | kwargs
            distinct = {id(given[key]): given[key] for key in inputs}  # self-attention gives one as three
            for x in distinct.values():
                columns = input_columns(module, x, name)  # [groups, n, cols]
                added = columns.mT @ columns
                self._sum = added if self._sum is None else self._sum + added
                self._n += columns.shape[1]

        return see

    def mean(self, name: str) -> Tensor:
        """Return the moment, float32 `[cols, cols]`, or `[groups, cols, cols]` of a grouped convolution.

        Raises:
            ValueError: No input was seen.
        """
        if self._sum is None or not self._n:
            raise ValueError(f"layer {name!r}: no input has reached it, so rounding='gptq' knows nothing of it")
        return (self._sum / self._n).squeeze(0)


def input_columns(module: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return what multiplies the columns of a layer's weight.

    Args:
        module: A Linear, attention, or a convolution in one or two dimensions.
        x: Its input.
        name: For messages.

    Returns:
        Float32 `[groups, n, cols]`; `cols` are those of the weight as a matrix.

    Raises:
        ValueError: Another kind of layer.

    Example:
        >>> input_columns(nn.Conv2d(2, 4, 3), torch.ones(1, 2, 5, 5), "conv").shape
        torch.Size([1, 9, 18])
    """
    x = x.detach().float()
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        x = torch.cat(x.unbind()) if x.is_nested else x
        return x.reshape(1, -1, x.shape[-1])
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        raise ValueError(
            f"layer {name!r}: rounding='gptq' knows Linear, attention, Conv1d and Conv2d, not {type(module).__name__}"
        )
    if x.ndim == module.weight.ndim - 1:
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    ones = (1,) * (4 - x.ndim)  # a Conv1d is a Conv2d of height 1
    x = x.reshape(x.shape[0], x.shape[1], *ones, *x.shape[2:])
    kernel, dilation, stride = ((*ones, *size) for size in (module.kernel_size, module.dilation, module.stride))
    patches = F.unfold(x, kernel, dilation, 0, stride)  # [n, channels * kernel, places]
    grouped = patches.view(len(x), module.groups, -1, patches.shape[-1])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)
