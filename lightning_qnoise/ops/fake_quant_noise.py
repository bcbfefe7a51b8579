"""Quant-Noise of a weight as one operator, `torch.ops.lightning_qnoise.fake_quant_noise`.

The blocks are chosen within it, from a seed and a rate that are tensors: a graph that was captured or compiled once
reads other values without a new capture, and no mask is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops.library import OPS
from lightning_qnoise.ops.noise_library import under_func


def fake_quant_noise(
    weight: Tensor,
    seed: Tensor,
    rate: Tensor,
    unit: int = 1,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    bits: int = 8,
    codes: Tensor | None = None,
    table: Tensor | None = None,
    clamp: bool = False,
) -> Tensor:
    """Replace random blocks of a weight by their quantized values, with a straight-through gradient.

    A block is `unit` consecutive elements of a row of the weight seen as `[rows, cols]`, its first dimension and all
    others. Which are replaced is what `philox_mask(seed, rate, rows, cols // unit)` says, bit by bit on every device.
    By what: with a scale by the nearest integers, `(code - zero_point) * scale`; with codes by `table[codes]`; with a
    table alone by its one row; otherwise by zeros. What is not replaced comes back bit-equal.

    Args:
        weight: Float, two or more dimensions; of any strides, those of a dense layout are kept. It is computed in
            float32.
        seed: int64 `[1]`.
        rate: float32 `[]`, the probability of a block.
        unit: Elements of a block; divides `cols`, and is 1 with a scale.
        scale: float32 `[rows, groups]`, one for `cols / groups` consecutive elements of a row, or `[1, 1]`.
        zero_point: As `scale`, whole numbers of any dtype; None is the middle, `2**(bits - 1)`.
        bits: Bits per code, 1 to 16.
        codes: Integers below K `[rows, cols // unit]`, which is not checked.
        table: Float `[K, unit]`.
        clamp: With a scale: cut every element to the range of the integers, replaced or not; what was outside gets no
            gradient.

    Returns:
        The noisy weight, as `weight`. The gradient with respect to it is the identity on every element, but for
        `clamp`; nothing else has one.

    Raises:
        ValueError: A shape or a dtype does not fit, or arguments contradict each other.

    Example:
        >>> weight, seed, rate = torch.arange(1.0, 9.0).view(2, 4), torch.tensor([0]), torch.tensor(0.5)
        >>> fake_quant_noise(weight, seed, rate, unit=2)
        tensor([[0., 0., 3., 4.],
                [0., 0., 7., 8.]])
    """
    run = under_func if torch._C._are_functorch_transforms_active() else OPS.fake_quant_noise
    return run(weight, seed, rate, unit, scale, zero_point, bits, codes, table, clamp)
