"""What packed layers keep between forwards: nothing that was decoded, or all of it."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from lightning_qnoise.layers import packed_weights

_Model = TypeVar("_Model", bound=nn.Module)


def set_memory(model: _Model, memory: Literal["lean", "fast"]) -> _Model:
    """Choose between memory and speed for a packed model, in place, and return it.

    `"lean"`, the default, decodes a weight in every forward that cannot do without. `"fast"` decodes it in the first
    forward without gradients and keeps it: the model then takes the memory of the float one beside the packed one, and
    as long as the float one. Both keep the codes of PQ, one or two bytes a block, where they are not stored so. What
    runs in integers keeps a byte an element: with the scheme `Int` in both, in place of floats in `"lean"`, with `PQ`
    (int8 codewords and activations) in `"fast"`.

    Args:
        model: A packed model.
        memory: `"lean"` or `"fast"`.

    Raises:
        ValueError: Another word.

    Example:
        >>> from lightning_qnoise import quantize
        >>> model = set_memory(quantize(nn.Sequential(nn.Linear(64, 64)), "int8"), "fast")
        >>> model[0].packed("weight").memory
        'fast'
    """
    if memory not in ("lean", "fast"):
        raise ValueError(f"memory must be 'lean' or 'fast', got {memory!r}")
    for _, packed in packed_weights(model):
        packed.memory = memory
        packed.forget()
    return model
